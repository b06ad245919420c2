"""The optimiser's parameter groups, the learning rate as a function of the step, and the averaged weights."""

from __future__ import annotations

import math

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor

from dydit.config import TrainConfig

ROUTER_MARK = "router"  # parameters of the routers have it in their names; nothing else does


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; the routers are a group of their own with ``router_lr``.

    Each group remembers its full rate as ``base_lr``; ``set_learning_rate`` derives ``lr`` from it.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    router_lr = config.lr if config.router_lr is None else config.router_lr
    split = [
        ([p for name, p in named if ROUTER_MARK not in name], config.lr),
        ([p for name, p in named if ROUTER_MARK in name], router_lr),
    ]
    groups = [{"params": params, "lr": rate, "base_lr": rate} for params, rate in split if params]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)


def lr_factor(config: TrainConfig, step: int) -> float:
    """Share of the full learning rate at ``step`` (0 is the first): linear warm-up, then the schedule to 0.

    A pure function instead of a scheduler object: nothing to save, exact on resume, and the same under any
    number of processes (accelerate steps a prepared scheduler once per process).
    """
    if step < config.lr_warmup_steps:
        return (step + 1) / (config.lr_warmup_steps + 1)
    if config.lr_schedule == "constant":
        return 1.0
    span = max(1, config.steps - config.lr_warmup_steps)
    progress = min(1.0, (step - config.lr_warmup_steps) / span)
    if config.lr_schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to ``factor`` of its full rate; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def make_ema(model: nn.Module, config: TrainConfig) -> EMAModel:
    """Averaged weights of ``model`` as it stands (wrapped and sharded models included), on ``ema_device``.

    The decay at step k is min((1 + k) / (10 + k), ``ema_decay``), diffusers' rule: without it a short run
    would average mostly its starting point.
    """
    parameters = local_parameters(model)
    # All tensors at once take a second copy of the weights for a moment; on the CPU that buys no speed.
    on_gpu = parameters[0].device.type != "cpu" and config.ema_device != "cpu"
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=on_gpu)
    if config.ema_device == "cpu":
        ema.to(device="cpu")
    return ema


def update_ema(ema: EMAModel, model: nn.Module) -> None:
    """Count the present weights into the average, wherever it lies.

    An average on the CPU costs a copy of the weights to it at every step, and no memory on the GPU.
    """
    present, place = local_parameters(model), ema.shadow_params[0].device
    if present[0].device != place:
        # Copies that say whether they are trained: the average takes frozen ones over as they are.
        present = [nn.Parameter(p.detach().to(place), requires_grad=p.requires_grad) for p in present]
    ema.step(present)


def local_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A model's parameters; where FSDP cut them up, this process's pieces, sharing their memory.

    An average needs no other process, and torch's operations on lists of tensors take no cut-up ones.
    """
    return [
        nn.Parameter(p.data.to_local(), requires_grad=p.requires_grad) if isinstance(p.data, DTensor) else p
        for p in model.parameters()
    ]
