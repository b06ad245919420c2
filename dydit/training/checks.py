"""What is refused before training starts, and how accelerate is set up."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

from dydit.config import RunConfig, Section, TrainConfig
from dydit.dynamic.compute_loss import minimum_ratio
from dydit.errors import CheckpointError, ConfigError

# A run cannot go on from a checkpoint when one of these differs: the tensors or their meaning would not fit.
FIXED_SECTIONS = ("task", "seed", "model", "dydit", "objective")


def make_accelerator(train: TrainConfig) -> Accelerator:
    """accelerate's entry point with our number format and compiler; devices are its launcher's affair."""
    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        # accelerate keeps one state per process and refuses a second run with another number format.
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=train.mixed_precision,
        dynamo_backend="inductor" if train.compile else None,
    )
    _shard_on_cpu(accelerator)
    return accelerator


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """FSDP for CPU processes too, when the launcher asks for it.

    accelerate's state turns FSDP on for processes with a GPU (or the like) and leaves it out, silently, for
    CPU ones; torch shards there as well, over gloo. The lines below are those that it runs for a GPU.
    """
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and accelerator.device.type == "cpu"
    # FSDP already: a second run in one process finds what the first one left.
    if wanted and accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP):
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Every new AcceleratorState takes it over from there.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def check_target(model: Any, cfg: RunConfig) -> None:
    """Refuse a compute target that no routing reaches.

    Raises:
        ConfigError: names the lowest target that can be reached.
    """
    lowest = minimum_ratio(model.shape, model.routing_config)
    if cfg.compute.target < lowest:
        raise ConfigError(
            f"compute.target is {cfg.compute.target}",
            expected=f"at least {math.ceil(lowest * 1e4) / 1e4:.4f}, the least this model can spend",
            remedy="raise compute.target",
        )


def check_dropout(model: Any, cfg: RunConfig) -> None:
    """Refuse to drop labels of a model that has nothing to put in their place.

    Raises:
        ConfigError: says how to go on.
    """
    if cfg.data.class_dropout > 0 and model.null_label is None:
        raise ConfigError(
            f"data.class_dropout is {cfg.data.class_dropout} for a model without a null class",
            remedy="set data.class_dropout=0",
        )


def check_same_run(cfg: RunConfig, saved: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another model, objective or data order.

    Steps, rates, batch size and the like may change.

    Args:
        cfg: the run now.
        saved: the configuration in the checkpoint, as JSON values.

    Raises:
        CheckpointError: names the section that differs.
    """
    mine = cfg.model_dump(mode="json")
    for section in FIXED_SECTIONS:
        before = _with_defaults(getattr(cfg, section), saved[section])
        if mine[section] != before:
            change = _first_change(section, before, mine[section])
            raise CheckpointError(
                f"the checkpoint was made with {change}",
                remedy=f"set {section} back, or start in another output_dir",
            )


def _with_defaults(section: Any, saved: Any) -> Any:
    """A saved section, and at its default what is new since: that means what was done before."""
    if not isinstance(section, Section) or not isinstance(saved, Mapping):
        return saved
    new = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(section).model_fields.items()
        if name not in saved and not field.is_required()
    }
    return {**saved, **new}


def _first_change(key: str, saved: Any, mine: Any) -> str:
    if isinstance(saved, dict) and isinstance(mine, dict):
        inner = next(name for name in {**saved, **mine} if saved.get(name) != mine.get(name))
        return _first_change(f"{key}.{inner}", saved.get(inner), mine.get(inner))
    return f"{key}={saved}, this run has {key}={mine}"
