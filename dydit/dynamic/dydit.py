"""DyDiT: a backbone whose heads, MLP groups and tokens are switched by routers (Zhao et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dydit.adapters.registry import adapter_for, build_backbone
from dydit.config import DyDiTConfig
from dydit.costs import ROUTERS
from dydit.dynamic.masked import BlockGates, masked_block
from dydit.errors import ConfigError, ShapeError
from dydit.guidance import forward_with_cfg
from dydit.models.blocks import Conditioning
from dydit.models.embeddings import batch_timesteps
from dydit.models.pretrained import PretrainedModel
from dydit.routing.gates import GateNoise
from dydit.routing.routers import BlockRouters, router_shape
from dydit.routing.routing import Routing, RoutingLogits
from dydit.shapes import ModelShape


@dataclass(frozen=True)
class _ModelGates:
    """What the blocks of one forward get to know of their gates.

    Args:
        heads: gates (B, L, H); None = all on.
        groups: gates (B, L, G); None = all on.
        tokens: gates (B, L, N) to use; None: the token routers decide.
        noise: for their decision in training.
        capacities: tokens that each block takes, in place of their threshold (L,).
        complete: everything on.
    """

    heads: Tensor | None = None
    groups: Tensor | None = None
    tokens: Tensor | None = None
    noise: GateNoise | None = None
    capacities: Sequence[int] | None = None
    complete: bool = False

    def of_block(self, i: int) -> BlockGates:
        """Those of block ``i``."""
        noise = self.noise
        return BlockGates(
            heads=None if self.heads is None else self.heads[:, i],
            groups=None if self.groups is None else self.groups[:, i],
            tokens=None if self.tokens is None else self.tokens[:, i],
            noise=None if noise is None else noise.tokens[:, i],
            temperature=None if noise is None else noise.temperature,
            capacity=None if self.capacities is None else self.capacities[i],
            complete=self.complete,
        )


class DynamicBlock(nn.Module):
    """One block's routers, and the block's masked forward; the block itself stays in the backbone."""

    def __init__(self, shape: ModelShape, config: DyDiTConfig) -> None:
        super().__init__()
        self.routers = BlockRouters(shape, config)

    def forward(
        self,
        adapter: Any,
        block: nn.Module,
        x: Tensor,
        cond: Conditioning,
        gates: BlockGates,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See ``masked_block``."""
        return masked_block(adapter, block, self.routers, x, cond, gates)


class DyDiT(PretrainedModel, ConfigMixin):
    """The trained form of a dynamic DiT: dense, gates multiply. Made by ``dydit.convert``.

    In training the gates are noisy and differentiable; in evaluation they are thresholded scores.

    Args:
        backbone_class: class name of the backbone (``dydit.adapters.registry.ADAPTERS``).
        backbone_config: constructor arguments of the backbone.
        dydit: fields of ``DyDiTConfig``.
        backbone: a backbone to wrap; built from its config when None.
    """

    _supports_gradient_checkpointing = True
    config_name = "config.json"
    ignore_for_config = ["backbone"]

    @register_to_config
    def __init__(
        self,
        backbone_class: str,
        backbone_config: dict[str, Any],
        dydit: dict[str, Any],
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.routing_config = DyDiTConfig(**dydit)
        self.backbone = build_backbone(backbone_class, backbone_config) if backbone is None else backbone
        self.adapter = adapter_for(self.backbone)
        shape = self.adapter.shape(self.backbone)
        self.shape = shape.with_groups(self.routing_config.mlp_groups or shape.num_heads)
        self.router_shape = router_shape(self.shape, self.routing_config)
        self.dynamic_blocks = nn.ModuleList(
            DynamicBlock(self.shape, self.routing_config) for _ in range(self.shape.depth)
        )

    @property
    def null_label(self) -> int | Tensor | None:
        """What guidance gives in the place of a label (see ``DiT.null_label``)."""
        return getattr(self.backbone, "null_label", self.shape.num_classes)

    @property
    def routers(self) -> list[BlockRouters]:
        """The routers of each block."""
        return [cast(DynamicBlock, block).routers for block in self.dynamic_blocks]

    def set_thresholds(self, width: float, tokens: float) -> None:
        """Change, in place, the scores above which gates are open in evaluation.

        Args:
            width: for heads and groups, between 0 and 1.
            tokens: for tokens, between 0 and 1.

        Raises:
            ConfigError: a threshold is out of range.
        """
        fields = {**self.routing_config.model_dump(), "threshold": width, "token_threshold": tokens}
        self.routing_config = DyDiTConfig(**fields)
        self.register_to_config(dydit=self.routing_config.model_dump())  # what save_pretrained writes
        for routers in self.routers:
            routers.config = self.routing_config

    def router_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of all routers."""
        return (p for block in self.dynamic_blocks for p in block.parameters())

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the backbone."""
        return self.backbone.parameters()

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        y: Tensor,
        *,
        complete: bool = False,
        return_routing: bool = False,
        routing: Routing | None = None,
        noise: GateNoise | None = None,
        capacities: Sequence[int] | None = None,
    ) -> Any:
        """Predict the noise of latents x (B, C, height, width) as the backbone does.

        Args:
            x, t, y: as for the backbone.
            complete: everything on; the routers do not run: the backbone itself.
            return_routing: also return the ``Routing`` that was used.
            routing: gates to use in place of the routers' decisions.
            noise: noise and temperature of the gates in training mode; None: drawn from torch's global
                generator, at the config's temperature.
            capacities: number of tokens (L,) that each block's MLP takes of every sample, highest scores
                first, in place of those above the threshold; in evaluation mode only.

        Returns:
            The prediction (B, C_out, height, width), or (prediction, Routing).

        Raises:
            ShapeError: latent, routing or capacities of the wrong shape.
            ConfigError: capacities in training mode, or together with other gates.
            DataError: a label lies outside the table.
        """
        if capacities is not None:
            self._check_capacities(capacities, gates_given=complete or routing is not None)
        cond = self.adapter.condition(self.backbone, batch_timesteps(t, x), y)
        tokens = self.adapter.embed(self.backbone, x, cond)
        if complete:
            run = _ModelGates(complete=True)
        elif routing is not None:
            routing.check(self.shape, x.shape[0])
            heads, groups, given = (
                g.to(tokens.dtype) for g in (routing.heads, routing.groups, routing.tokens)
            )
            run = _ModelGates(heads, groups, given)
        else:
            logits = self.width_logits(cond.timestep)
            heads, groups = self._width_gates(logits, noise)
            run = _ModelGates(heads, groups, noise=noise, capacities=capacities)
        kept: list[Any] = []  # gates (B, N) and logits (B, N) per block; None where complete
        for i, (dynamic, block) in enumerate(zip(self.dynamic_blocks, self._blocks(), strict=True)):
            tokens, *keep = self._run_block(dynamic, block, tokens, cond, run.of_block(i))
            kept.append(keep)
        prediction = self.adapter.decode(self.backbone, tokens, cond)
        if not return_routing:
            return prediction
        if complete:
            return prediction, Routing.complete(self.shape, x.shape[0], tokens)
        gates, token_logits = zip(*kept, strict=True)
        found = None if routing is not None else RoutingLogits(*logits, torch.stack(token_logits, dim=1))
        return prediction, Routing(heads, groups, torch.stack(gates, dim=1), found)

    def width_logits(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Head logits (B, L, H) and group logits (B, L, G) for timestep embeddings (B, D)."""
        heads = torch.stack([r.head_logits(timestep) for r in self.routers], dim=1)
        groups = torch.stack([r.group_logits(timestep) for r in self.routers], dim=1)
        return heads, groups

    forward_with_cfg = forward_with_cfg

    def width_gates(self, timestep: Tensor, noise: GateNoise | None = None) -> tuple[Tensor, Tensor]:
        """Head gates (B, L, H) and group gates (B, L, G) for timestep embeddings (B, D)."""
        return self._width_gates(self.width_logits(timestep), noise)

    def _width_gates(self, logits: tuple[Tensor, Tensor], noise: GateNoise | None) -> tuple[Tensor, Tensor]:
        """All blocks' gates at once: a few operations instead of a few per block."""
        gate = self.routers[0].width_gate
        if noise is None:
            return gate(logits[0]), gate(logits[1])
        heads = gate(logits[0], noise.heads, noise.temperature)
        return heads, gate(logits[1], noise.groups, noise.temperature)

    def mac_scopes(self) -> dict[str, str]:
        """Name of each block in a MAC report -> the submodule whose call it is."""
        return {f"block {i}": f"dynamic_blocks.{i}" for i in range(self.shape.depth)}

    def mac_parts(self) -> dict[str, str]:
        """Name of a layer -> its part in a MAC report."""
        return {**self.adapter.layer_parts, "routers": ROUTERS}

    def _blocks(self) -> nn.ModuleList:
        return self.adapter.blocks(self.backbone)

    def _check_capacities(self, capacities: Sequence[int], gates_given: bool) -> None:
        N, L = self.shape.tokens, self.shape.depth
        if self.training or gates_given:
            raise ConfigError(
                "capacities in training mode" if self.training else "capacities together with other gates",
                expected="evaluation mode, and the routers to decide which tokens",
                remedy="call eval() on the model, and give neither complete nor routing",
            )
        least = 0 if self.routing_config.token_routing else N  # without scores no token comes first
        if len(capacities) != L or not all(least <= k <= N for k in capacities):
            raise ShapeError(
                f"capacities {list(capacities)}", expected=f"{L} numbers of tokens, {least} to {N} each"
            )

    def _run_block(self, dynamic: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(dynamic, self.adapter, *args)
        return dynamic(self.adapter, *args)
