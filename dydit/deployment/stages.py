"""A model's forward cut into functions of tensors alone: what torch.export can take, weights as inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dydit.dynamic.dydit import DyDiT
from dydit.models.blocks import Conditioning, Modulation
from dydit.runtime.packing import PackedBlock, Weights
from dydit.runtime.sliced import SlicedBlock

Fields = dict[str, Tensor]  # of a Conditioning, without those that are None


class Stage(nn.Module):
    """A function of parts of a model that takes the parameters it uses as its first input.

    Args:
        model: whose parameters they are.
        function: of tensors; calls parts of ``model``.
        names: of the parameters and buffers in the model's state dict.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any], names: Sequence[str]) -> None:
        super().__init__()
        self._hidden = (_Caller(model, function), tuple(names))  # a tuple: the program owns no parameter

    def forward(self, weights: list[Tensor], *inputs: Any) -> Any:
        """What the function gives with ``weights`` in the place of the parameters."""
        caller, names = self._hidden
        named = {f"model.{name}": tensor for name, tensor in zip(names, weights, strict=True)}
        return torch.func.functional_call(caller, named, inputs)


class _Caller(nn.Module):
    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class _Used(TorchFunctionMode):
    """Collects the tensors that torch's functions are called with, by identity, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = tree_leaves((args, kwargs or {}))
        self.tensors.update((id(leaf), None) for leaf in inputs if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def used_weights(model: nn.Module, function: Callable[..., Any], *inputs: Any) -> tuple[list[str], Any]:
    """Names in the state dict of what ``function(*inputs)`` uses, in order of first use; and its output."""
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    with _Used() as used:
        output = function(*inputs)
    return [names[tensor] for tensor in used.tensors if tensor in names], output


class Stages:
    """The functions of one model: from latents to tokens, the parts of a block, and back.

    Conditioning and modulation cross as plain containers of tensors, since programs know no classes.

    Args:
        model: in evaluation.
        conditioning: the class that its adapter gives.
    """

    def __init__(self, model: DyDiT, conditioning: type[Conditioning]) -> None:
        self.model, self.adapter, self.backbone = model, model.adapter, model.backbone
        self.conditioning = conditioning
        blocks = zip(self.adapter.blocks(self.backbone), model.routers, strict=True)
        threshold = model.routing_config.token_threshold
        self.blocks = [SlicedBlock(self.adapter, block, r.token_router, threshold) for block, r in blocks]

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Fields]:
        """Latents (B, C, height, width), timesteps (B,), labels to tokens (B, N, D) and conditioning."""
        cond = self.adapter.condition(self.backbone, t, y)
        return self.adapter.embed(self.backbone, x, cond).contiguous(), fields_of(cond)

    def decode(self, tokens: Tensor, cond: Fields) -> Tensor:
        """Tokens (B, N, D) to the prediction (B, C_out, height, width)."""
        return self.adapter.decode(self.backbone, tokens, self.conditioning(**cond))

    def attend(self, block: int) -> Callable[..., Any]:
        """Of one block, with its layers cut down: those of q, k and v, then the output projection.

        See ``SlicedBlock.attend``.
        """

        def run(
            x: Tensor, cond: Fields, layers: list[Weights]
        ) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
            *qkv, out = layers
            packed = self._packed(qkv=qkv, out=out)
            x, m, logits = self.blocks[block].attend(x, self.conditioning(**cond), packed)
            return x, list(m), logits

        return run

    def mlp_of_all(self, block: int) -> Callable[..., Tensor]:
        """Of one block, with its layers cut down: fc1, where there is a group, then fc2.

        See ``SlicedBlock.mlp_of_all``.
        """

        def run(x: Tensor, m: list[Tensor | None], layers: list[Weights]) -> Tensor:
            return self.blocks[block].mlp_of_all(x, Modulation(*m), self._packed_mlp(layers))

        return run

    def mlp_of_kept(self, block: int) -> Callable[..., Tensor]:
        """Of one block and the layers of ``mlp_of_all``; see ``SlicedBlock.mlp_of_kept``."""

        def run(x: Tensor, m: list[Tensor | None], layers: list[Weights], kept: Tensor) -> Tensor:
            packed = self._packed_mlp(layers)
            return self.blocks[block].mlp_of_kept(x.clone(), Modulation(*m), packed, kept)

        return run

    def _packed_mlp(self, layers: list[Weights]) -> PackedBlock:
        *fc1, fc2 = layers
        return self._packed(fc1=fc1[0] if fc1 else None, fc2=fc2)

    def _packed(
        self, qkv: Sequence[Weights] = (), out: Any = None, fc1: Weights | None = None, fc2: Any = None
    ) -> PackedBlock:
        head_dim = self.model.shape.hidden_size // self.model.shape.num_heads
        return PackedBlock(tuple(qkv), out, fc1, fc2, head_dim, copied_bytes=0)


def fields_of(cond: Conditioning) -> Fields:
    """A conditioning's tensors by name."""
    values = {field.name: getattr(cond, field.name) for field in dataclasses.fields(cond)}
    return {name: value for name, value in values.items() if value is not None}
