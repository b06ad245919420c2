"""DyDiT: a backbone whose heads, MLP groups and tokens are switched by routers (Zhao et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dydit.adapters.registry import adapter_for, build_backbone
from dydit.config import DyDiTConfig
from dydit.dynamic.masked import masked_block
from dydit.models.blocks import Conditioning
from dydit.routing.routers import BlockRouters, router_shape
from dydit.routing.routing import Routing
from dydit.shapes import ModelShape


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
        heads: Tensor | None,
        groups: Tensor | None,
        tokens: Tensor | None,
        complete: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``masked_block``."""
        return masked_block(adapter, block, self.routers, x, cond, heads, groups, tokens, complete)


class DyDiT(ModelMixin, ConfigMixin):
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
    def null_label(self) -> int:
        """Label of the null class in classifier-free guidance."""
        return self.shape.num_classes

    @property
    def routers(self) -> list[BlockRouters]:
        """The routers of each block."""
        return [cast(DynamicBlock, block).routers for block in self.dynamic_blocks]

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
    ) -> Any:
        """Predict the noise of latents x (B, C, height, width) as the backbone does.

        Args:
            x, t, y: as for the backbone.
            complete: everything on; the routers do not run: the backbone itself.
            return_routing: also return the ``Routing`` that was used.
            routing: gates to use in place of the routers' decisions.

        Returns:
            The prediction (B, C_out, height, width), or (prediction, Routing).

        Raises:
            ShapeError: latent or routing of the wrong shape.
            DataError: a label lies outside the table.
        """
        tokens, cond = self.adapter.embed(self.backbone, x, t, y)
        if routing is None and not complete:
            heads, groups = self.width_gates(cond.timestep)
            forced = None
        elif routing is not None:
            routing.check(self.shape, x.shape[0])
            heads, groups, forced = (
                g.to(tokens.dtype) for g in (routing.heads, routing.groups, routing.tokens)
            )
        kept: list[Any] = []  # gates (B, N) per block; None where complete
        for i, (dynamic, block) in enumerate(zip(self.dynamic_blocks, self._blocks(), strict=True)):
            gates = (
                (None, None, None)
                if complete
                else (heads[:, i], groups[:, i], None if forced is None else forced[:, i])
            )
            tokens, keep = self._run_block(dynamic, block, tokens, cond, *gates, complete)
            kept.append(keep)
        prediction = self.adapter.decode(self.backbone, tokens, cond)
        if not return_routing:
            return prediction
        if complete:
            return prediction, Routing.complete(self.shape, x.shape[0], tokens)
        return prediction, Routing(heads, groups, torch.stack(kept, dim=1))

    def width_gates(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Head gates (B, L, H) and group gates (B, L, G) for timestep embeddings (B, D)."""
        heads = torch.stack([r.head_gates(timestep) for r in self.routers], dim=1)
        groups = torch.stack([r.group_gates(timestep) for r in self.routers], dim=1)
        return heads, groups

    def mac_scopes(self) -> dict[str, str]:
        """Name of each block in a MAC report -> the submodule whose call it is."""
        return {f"block {i}": f"dynamic_blocks.{i}" for i in range(self.shape.depth)}

    def _blocks(self) -> nn.ModuleList:
        return self.adapter.blocks(self.backbone)

    def _run_block(self, dynamic: nn.Module, *args: Any) -> tuple[Tensor, Tensor | None]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(dynamic, self.adapter, *args)
        return dynamic(self.adapter, *args)
