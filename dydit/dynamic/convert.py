"""Backbone -> DyDiT."""

from __future__ import annotations

import copy as copying
from typing import Any

import torch

from dydit.adapters.registry import adapter_for, backbone_class
from dydit.config import DyDiTConfig
from dydit.dynamic.dydit import DyDiT
from dydit.dynamic.importance import permute_by_importance
from dydit.errors import ShapeError


def convert(backbone: Any, config: DyDiTConfig | None = None, *, copy: bool = True) -> DyDiT:
    """Wrap a pretrained backbone with routers; until it is trained the result computes the same.

    Heads and MLP channels are first ordered by weight magnitude (unless ``config.rank`` is "none"), so
    that the always-on head and group of each block are its most important ones.

    Args:
        backbone: a model of any supported class (``dydit.adapters.registry``).
        config: which routers, and how they start; defaults to ``DyDiTConfig()``.
        copy: work on a copy; False wraps and reorders ``backbone`` itself and saves the memory.

    Raises:
        ShapeError: the class has no adapter, the groups do not divide the MLP, or the activation does not
            keep zero, so that a masked group could not be left out.
    """
    config = config or DyDiTConfig()
    adapter = adapter_for(backbone)
    shape = adapter.shape(backbone)
    shape.with_groups(config.mlp_groups or shape.num_heads)  # refuse before copying
    _check_activation(adapter.mlp(adapter.blocks(backbone)[0]).act)
    if copy:
        backbone = copying.deepcopy(backbone)
    if config.rank == "magnitude":
        permute_by_importance(adapter, backbone)
    arguments = {k: v for k, v in backbone.config.items() if not k.startswith("_")}
    # By name: diffusers takes positional arguments for defaults, and from_config would leave them out.
    model = DyDiT(
        backbone_class=backbone_class(backbone),
        backbone_config=arguments,
        dydit=config.model_dump(),
        backbone=backbone,
    )
    first = next(backbone.parameters())
    model.dynamic_blocks.to(device=first.device, dtype=first.dtype)
    return model.train(backbone.training)


def _check_activation(act: Any) -> None:
    zero = torch.zeros(1)
    if act(zero).abs().item() != 0:
        raise ShapeError(
            "the MLP's activation moves zero", expected="act(0) = 0, as GELU, SiLU and ReLU have"
        )
