"""One timestep's subnetwork as a network of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError
from dydit.models.embeddings import batch_timesteps
from dydit.runtime.inputs import check_inputs
from dydit.runtime.packing import PackedBlock
from dydit.runtime.sliced import SlicedBlock


@dataclass(frozen=True)
class BlockAtTimestep:
    """A block, and what it runs with: its slices and, in mode ``capacity``, its number of tokens."""

    block: SlicedBlock
    packed: PackedBlock
    capacity: int | None


class Subnetwork(nn.Module):
    """The subnetwork of one timestep: ``subnetwork(x, y)`` is ``engine(x, timestep, y)``.

    In mode ``capacity`` no shape in it depends on the data: it is one graph for ``torch.compile(...,
    fullgraph=True)``, ``torch.export`` and CUDA graphs. It has slices of its own, besides the engine's
    budget, and otherwise runs on the model's weights. A module without parameters, so that an export of it
    holds the weights that it uses and no others.

    Attributes:
        timestep: in the model's units.
    """

    def __init__(self, model: DyDiT, timestep: float, blocks: Sequence[BlockAtTimestep]) -> None:
        super().__init__()
        self.timestep = timestep
        self._parts = (model, tuple(blocks))  # a tuple, so that nothing is registered

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Predict the noise of latents x (B, C, height, width) as the engine does; y as for the model.

        Raises:
            ShapeError: no sample, or one of another shape, dtype or device. Compiled or exported, it does not
                look.
        """
        model, blocks = self._parts
        if not torch.compiler.is_compiling():
            check_inputs(x, y, model.shape, next(model.parameters()))
        cond = model.adapter.condition(model.backbone, batch_timesteps(self.timestep, x), y)
        # The token path works on its rows in place.
        tokens = model.adapter.embed(model.backbone, x, cond).contiguous()
        for part in blocks:
            tokens = part.block(tokens, cond, part.packed, part.capacity)
        return model.adapter.decode(model.backbone, tokens, cond)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Subnetwork:
        """Refuse to move or convert: the weights are the engine's.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a subnetwork to move or convert",
            expected="the engine that it came from",
            remedy="move the engine, and take the subnetwork from it again",
        )
