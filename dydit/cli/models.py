"""The model that a verb's MODEL argument means: a weights file, a folder, a run's folder, or a Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dydit.config import find_path, load_config
from dydit.dynamic.dydit import DyDiT
from dydit.dynamic.loading import load_dydit
from dydit.errors import CheckpointError
from dydit.export.artefact import is_artefact
from dydit.export.schedule import SubnetSchedule
from dydit.models.dit import DiT
from dydit.models.loading import load_backbone, stored_class
from dydit.training.folder import CONFIG_FILE, MODEL_FOLDER
from dydit.training.metrics import METRICS_FILE


def open_dydit(path: str) -> DyDiT:
    """The dynamic model at ``path``, in evaluation mode.

    Raises:
        CheckpointError: there is none, it is broken, or it is a static model.
    """
    return load_dydit(model_path(path))


def open_model(path: str) -> DiT | DyDiT:
    """The static or dynamic model at ``path``, in evaluation mode.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    path = model_path(path)
    return load_dydit(path) if stored_class(path) == DyDiT.__name__ else load_backbone(path)


def sampler_defaults(path: str) -> dict[str, Any]:
    """Sampler settings of the run that ``path`` or its model is of, or of an export; empty for neither.

    Raises:
        ScheduleError: the export is damaged.
    """
    run, folder = _run_of(path), Path(find_path(path))
    if run is not None:
        return load_config(run / CONFIG_FILE).sampler.model_dump()
    return SubnetSchedule.load(folder).sampler if is_artefact(folder) else {}


def trained_target(path: str) -> float | None:
    """Compute ratio of the fine-tuning run that ``path``, or its model, is of; None where it is none."""
    run = _run_of(path)
    config = None if run is None else load_config(run / CONFIG_FILE)
    return None if config is None or config.task != "finetune" else config.compute.target


def model_path(path: str) -> str:
    """Where the weights are: for a run, its exported averaged weights.

    Raises:
        CheckpointError: the run is not finished.
    """
    run = _run_folder(path)
    if run is None:
        return find_path(path)
    if not (run / MODEL_FOLDER).is_dir():
        raise CheckpointError(
            f"run {path} is not finished: no {run / MODEL_FOLDER}", remedy="continue it with --resume auto"
        )
    return str(run / MODEL_FOLDER)


def _run_folder(path: str) -> Path | None:
    folder = Path(find_path(path))
    return folder if (folder / CONFIG_FILE).is_file() else None


def _run_of(path: str) -> Path | None:
    """The run that trained what ``path`` names: the run's folder, the model in it, or that one's weights."""
    place = Path(find_path(path))
    model = place.parent if place.is_file() else place
    # Others have folders "model" beside a config.yaml too.
    trained = model.name == MODEL_FOLDER and (model.parent / METRICS_FILE).is_file()
    return _run_folder(str(model.parent) if trained else path)
