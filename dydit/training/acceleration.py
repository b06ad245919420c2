"""How accelerate is set up, and what it leaves out where FSDP is asked for."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    convert_outputs_to_fp32,
    get_mixed_precision_context_manager,
)
from torch import nn

from dydit.config import TrainConfig
from dydit.errors import ConfigError


def make_accelerator(train: TrainConfig) -> Accelerator:
    """accelerate's entry point with our number format and compiler; devices are its launcher's affair.

    Raises:
        ConfigError: float16 on a CPU, where accelerate would train in float32 without a word.
    """
    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        # accelerate keeps one state per process and refuses a second run with another number format.
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=train.mixed_precision,
        dynamo_backend="inductor" if train.compile else None,
    )
    if train.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError(
            "train.mixed_precision fp16 on a CPU",
            expected="bf16 or no",
            remedy="set it to bf16, or use a GPU",
        )
    _shard_on_cpu(accelerator)
    return accelerator


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """accelerate's ``prepare``, with autocast in the model's forward under FSDP as everywhere else.

    accelerate leaves mixed precision to FSDP2 there, which holds all weights in the smaller format, those of
    the routers too, and on a CPU does nothing. With autocast the gates are the same whatever the launcher.
    """
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.native_amp:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        autocast = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


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
