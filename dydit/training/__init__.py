"""One training loop for static and dynamic models; stages are configuration."""

from dydit.training.data import DATASETS, LabelledImages, make_dataset
from dydit.training.loop import TrainResult, train
from dydit.training.run import run_training
from dydit.training.trainer import Trainer

__all__ = ["DATASETS", "LabelledImages", "TrainResult", "Trainer", "make_dataset", "run_training", "train"]
