"""A training run from its configuration alone: build model and data, then train, or only try it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import set_seed

from dydit.compute.machine import peak_memory
from dydit.config import RunConfig, dump_config
from dydit.costs import static_macs
from dydit.dynamic.convert import convert
from dydit.models.dit import DiT
from dydit.models.loading import load_backbone
from dydit.training.data import LabelledImages, make_dataset
from dydit.training.image_size import with_image_size
from dydit.training.loop import Loop, OnStep, TrainResult, train
from dydit.training.memory import MIB, SavedForBackward, describe_state, state_memory
from dydit.training.metrics import one_line
from dydit.training.rng import scoped_rng
from dydit.training.trainer import Trainer


def run_training(
    cfg: RunConfig, resume: str | None = None, dry_run: bool = False, callback: OnStep | None = None
) -> TrainResult:
    """Build model and data as configured, and train.

    Args:
        cfg: the run; ``task`` pretrain trains a static DiT, finetune converts a backbone and trains that.
        resume: ``auto`` (newest intact checkpoint in ``output_dir``, or from the start if there is none), the
            path of a checkpoint or run folder, or None to start in an empty folder.
        dry_run: print configuration, sizes and compute, try one step from where the run would start, write
            nothing.
        callback: called after every step with its number, and with the metrics when they were logged.

    Raises:
        ConfigError: model, data and settings do not fit together, or the compute target cannot be reached.
        CheckpointError: the backbone or the checkpoint to resume cannot be used.
        DataError: a sample cannot be used.
        OutputError: the run folder cannot be written, or holds a run already.
        TrainingError: the loss stayed non-finite.
    """
    cfg = with_image_size(cfg)
    dataset = make_dataset(cfg.data)
    with scoped_rng():
        set_seed(cfg.seed)
        model, backbone = build_model(cfg, dataset.num_classes)
    if dry_run:
        return _try_one_step(model, cfg, dataset, backbone, resume)
    return train(model, cfg, dataset, frozen_backbone=backbone, resume=resume, on_step=callback)


def build_model(cfg: RunConfig, num_classes: int) -> tuple[Any, Any]:
    """The model to train on ``num_classes`` classes, and the backbone it was converted from.

    The backbone is None for pretrain, and where no loss needs it.
    """
    if cfg.task == "pretrain":
        assert cfg.model is not None  # RunConfig refuses pretrain without it
        arguments = cfg.model.dit_arguments()
        preset = cfg.model.preset
        return (DiT(**arguments) if preset is None else DiT.from_preset(preset, **arguments)), None
    assert cfg.backbone is not None
    wanted = num_classes if cfg.on_class_mismatch == "drop" else None
    # Weights, moments and averages in float32, whatever the file holds; train.mixed_precision is autocast's.
    backbone = load_backbone(cfg.backbone, dtype=torch.float32, num_classes=wanted, on_class_mismatch="drop")
    distils = cfg.warmup.mode == "distill" and cfg.warmup.steps > 0
    return convert(backbone, cfg.dydit, copy=distils), backbone if distils else None


def describe(model: Any, cfg: RunConfig, shards: int = 1, teacher: Any = None) -> str:
    """The resolved configuration, the parameter counts, the compute and the memory of a run, as text.

    Args:
        shards: processes that FSDP cuts the state up over; 1 without it.
        teacher: the frozen backbone of a distillation.
    """
    parameters = sum(p.numel() for p in model.parameters())
    gmacs = static_macs(model.shape) / 1e9
    lines = [dump_config(cfg).rstrip(), f"parameters: {parameters:,}"]
    if cfg.task == "finetune":
        lines[-1] += f" ({sum(p.numel() for p in model.router_parameters()):,} in routers)"
    lines.append(f"static compute: {gmacs:.6g} GMACs = {2 * gmacs:.6g} GFLOPs per image and step")
    if cfg.task == "finetune":
        wanted = gmacs * cfg.compute.target
        lines.append(f"target {cfg.compute.target:g}: {wanted:.6g} GMACs = {2 * wanted:.6g} GFLOPs")
    lines.append(describe_state(state_memory(model, cfg.train, shards, teacher)))
    return "\n".join(lines)


def _try_one_step(
    model: Any, cfg: RunConfig, dataset: LabelledImages, backbone: Any, resume: str | None
) -> TrainResult:
    with scoped_rng():
        trainer = Trainer(model, cfg, dataset, backbone)
        Loop(trainer, Path(cfg.output_dir)).take_up(resume)
        accelerator = trainer.accelerator
        if accelerator.is_main_process:
            sharded = accelerator.distributed_type == DistributedType.FSDP
            print(describe(trainer.plain, cfg, accelerator.num_processes if sharded else 1, backbone))
        with SavedForBackward(trainer.plain) as saved:
            trainer.step()
        record = trainer.metrics()
        if accelerator.is_main_process:
            print(f"one step of {trainer.global_batch} images: {one_line(record)}")
            kept = "not measured with gradient checkpointing"
            if not cfg.train.gradient_checkpointing:
                kept = f"{saved.peak / MIB:.1f} MiB"
            print(f"activations for the backward of {cfg.data.batch_size} images: {kept}")
            whose = "this process" if accelerator.device.type == "cpu" else "the GPU"
            print(f"peak memory of {whose}: {peak_memory(accelerator.device) / MIB:.0f} MiB")
        return TrainResult(1, trainer.close(), record)
