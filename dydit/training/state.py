"""A model's and an optimiser's state by parameter name, for plain, DDP, FSDP and compiled models alike.

Names come from torch's distributed state-dict functions, which see through the wrappers and gather shards,
so a checkpoint of one kind of run can be resumed by another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dydit.errors import CheckpointError
from dydit.training.optim import local_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers.training_utils import EMAModel

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCATTER = StateDictOptions(full_state_dict=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may hold in pieces, put together; a collective where it does."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, on the CPU; a collective. Empty on other ranks than the first."""
    gathered: dict[str, Any] = get_model_state_dict(model, options=_GATHER)
    return {name: tensor.clone() for name, tensor in gathered.items()}  # ours, whatever the model does next


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put weights back; every rank passes the whole of them.

    Raises:
        CheckpointError: ``what`` has other tensors than the model; names the first.
    """
    names = get_model_state_dict(model).keys()
    _check_names(names, tensors, what)
    try:
        set_model_state_dict(model, dict(tensors), options=_SCATTER)
    except RuntimeError as problem:
        raise CheckpointError(f"{what} does not fit the model: {problem}") from None


@contextmanager
def averaged_weights(model: nn.Module, ema: EMAModel) -> Iterator[None]:
    """The model with its averaged weights, for as long as the context lasts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without backward the whole of some weights is still there
    parameters = local_parameters(model)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def ema_weights(model: nn.Module, ema: EMAModel) -> dict[str, Tensor]:
    """Averaged parameters, and the model's buffers, as ``weights`` gives them."""
    with averaged_weights(model, ema):
        return weights(model)


def load_ema(model: nn.Module, ema: EMAModel, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Put averaged weights back; the model's own weights come afterwards, with ``load_weights``."""
    load_weights(model, tensors, "ema.safetensors")
    place = ema.shadow_params[0].device
    ema.shadow_params = [p.detach().to(place, copy=True) for p in local_parameters(model)]
    ema.optimization_step = steps


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as ``parameter name.moment``; a collective. Empty before the first step.

    Rates and decays are not in it: they are a function of config and step.
    """
    if not optimizer.state:  # asking torch for it would make one up, with a step counted
        return {}
    state: Any = get_optimizer_state_dict(model, optimizer, options=_GATHER).get("state", {})
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, moments in state.items()
        for key, value in moments.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put moments and step counts back.

    Raises:
        CheckpointError: they belong to other parameters.
    """
    if not tensors:
        return
    template: Any = get_optimizer_state_dict(model, optimizer)
    expected = [f"{name}.{key}" for name, moments in template["state"].items() for key in moments]
    _check_names(expected, tensors, "optimizer.safetensors")
    # New dictionaries: the template's are the optimiser's own, which FSDP looks up how to cut the tensors up.
    moments: Any = {
        name: {key: tensors[f"{name}.{key}"] for key in held} for name, held in template["state"].items()
    }
    set_optimizer_state_dict(model, optimizer, {**template, "state": moments}, options=_SCATTER)


def unsharded(accelerator: Any, model: Any, kind: Any, ema: EMAModel) -> Any:
    """The trained model without wrappers, with the averaged weights; a collective.

    In place where the parameters are whole; FSDP's are cut up for good, so a new model takes them there.

    Args:
        accelerator: that wrapped the model.
        model: as it came back from there.
        kind: the model's class before.
        ema: the averaged weights.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        ema.copy_to(local_parameters(model))
        return accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    with averaged_weights(model, ema):
        tensors = get_model_state_dict(model, options=_SCATTER)
    whole_model = kind.from_config(model.config)
    whole_model.load_state_dict(tensors)
    return whole_model


def _check_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        seen = f"lacks {missing[0]}" if missing else f"also has {extra[0]}"
        raise CheckpointError(
            f"{what} {seen} ({len(missing)} tensors missing, {len(extra)} left over)",
            expected="the tensors of the configured model",
            remedy="resume with the config that the run was started with",
        )
