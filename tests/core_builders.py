"""Small models with random weights and chosen masks, for the tests of the core.

A fresh DiT puts out zeros (its last layer starts at zero), which would make every comparison trivial: the
builders draw every parameter at random, and ``relative_error`` refuses outputs that are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dydit.config import DyDiTConfig
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.models.blocks import Conditioning
from dydit.models.dit import DiT
from dydit.models.embeddings import batch_timesteps
from dydit.routing.gates import logit
from dydit.routing.routing import Routing
from dydit.runtime import layers
from dydit.shapes import ModelShape

TIMESTEPS = (999.0, 500.0, 20.0)
TEXT = {"context_dim": 12, "context_length": 5}


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Draw every parameter from N(0, std²)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def small_dit(seed: int = 0, **overrides: Any) -> DiT:
    """A DiT of two blocks, with random weights, in evaluation."""
    arguments: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2,
        "num_heads": 4, "num_classes": 10, **overrides,
    }  # fmt: skip
    if arguments.get("conditioning") == "adaln_single":
        arguments = {**TEXT, **arguments}
    model = DiT(**arguments)
    randomize(model, seed)
    return model.eval()


def small_diffusers_dit(**overrides: Any) -> DiTTransformer2DModel:
    """diffusers' model of two blocks, with random weights, in evaluation."""
    arguments: dict[str, Any] = {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 3,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, **overrides,
    }  # fmt: skip
    model = DiTTransformer2DModel(**arguments)
    randomize(model)
    return model.eval()


def small_inputs(shape: ModelShape, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents (B, C, height, width), and labels (B,) with the null class among them, or text."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, shape.in_channels, *shape.sample_size, generator=generator)
    if shape.conditioning == "adaln_single":
        return x, torch.randn(batch, shape.context_length, shape.context_dim, generator=generator)
    return x, torch.arange(shape.num_classes, shape.num_classes - batch, -1) % (shape.num_classes + 1)


def embedded(model: DiT, x: Tensor, t: float, y: Tensor) -> tuple[Tensor, Conditioning]:
    """The tokens (B, N, D) that a model's first block gets, and its conditioning."""
    cond = model.condition(batch_timesteps(t, x), y)
    return model.embed(x, cond), cond


def random_masks(seed: int, steps: int, shape: ModelShape, always_on: bool = True) -> tuple[Any, Any]:
    """Head masks (S, L, H) and group masks (S, L, G), bool, the first component on where always_on."""
    rng = np.random.default_rng(seed)
    heads = rng.random((steps, shape.depth, shape.num_heads)) < 0.5
    groups = rng.random((steps, shape.depth, shape.mlp_groups)) < 0.5
    if always_on:
        heads[..., 0] = groups[..., 0] = True
    return heads, groups


def small_dydit(
    seed: int = 0, config: DyDiTConfig | None = None, mixed: bool = True, **overrides: Any
) -> DyDiT:
    """A converted ``small_dit``; ``mixed``: routers that open about half of everything at TIMESTEPS."""
    config = config or DyDiTConfig(token_router_ratio=4)
    model = convert(small_dit(seed, **overrides), config, copy=False)
    if mixed:
        heads, groups = random_masks(seed, len(TIMESTEPS), model.shape, config.always_on)
        route_widths(model, TIMESTEPS, heads, groups)
        x, y = small_inputs(model.shape, batch=len(TIMESTEPS), seed=seed)
        route_tokens(model, x, torch.tensor(TIMESTEPS), y)
    return model


@torch.no_grad()
def route_widths(model: DyDiT, timesteps: Sequence[float], heads: np.ndarray, groups: np.ndarray) -> None:
    """Set the width routers so that they give masks (S, L, H) and (S, L, G) at the timesteps (S,).

    One Linear per router suffices: its weights solve "embedding · weight = ±10" at the timesteps.
    """
    embedding = model.adapter.timestep_embedding(model.backbone, torch.tensor(timesteps))
    inverse = torch.linalg.pinv(embedding.double())  # (D, S)
    for block, routers in enumerate(model.routers):
        for router, masks in ((routers.head_router, heads), (routers.group_router, groups)):
            if router is not None:
                wanted = torch.from_numpy(masks[:, block, int(router.always_on) :])  # (S, scores)
                router.router.weight.copy_((inverse @ (20.0 * wanted.double() - 10.0)).T)
                router.router.bias.zero_()


@torch.no_grad()
def route_tokens(
    model: DyDiT, x: Tensor, t: Tensor | float, y: Tensor, shares: Sequence[str] | None = None
) -> None:
    """Set the token routers so that on this batch each block keeps "none", "some" or "all" of the tokens.

    For "some" the threshold comes to lie in the widest gap between the scores, so that rounding, which
    differs between two ways to compute the same, does not decide.
    """
    threshold = logit(model.routing_config.token_threshold)
    for i, routers in enumerate(model.routers):
        router: Any = routers.token_router
        if router is None:
            continue
        share = "some" if shares is None else shares[i]
        randomize(router, seed=100 + i, std=0.5)
        router[2].bias.fill_({"none": -1e4, "some": 0.0, "all": 1e4}[share])
        if share == "some":
            seen: list[Tensor] = []
            with router.register_forward_hook(lambda _m, _i, logits, seen=seen: seen.append(logits)):
                model(x, t, y)
            ordered = seen[0].flatten().sort().values
            middle = ordered[len(ordered) // 4 : len(ordered) * 3 // 4 + 1]
            widest = int(middle.diff().argmax())
            router[2].bias.fill_(threshold - middle[widest : widest + 2].mean())


def routing_of(heads: np.ndarray, groups: np.ndarray, tokens: Tensor) -> Routing:
    """Forced gates from bool masks (B, L, H) and (B, L, G) and token gates (B, L, N)."""
    return Routing(torch.from_numpy(heads).float(), torch.from_numpy(groups).float(), tokens.float())


def gates_of(routing: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of a Routing, its logits or its noise: heads (B, L, H), groups (B, L, G) and tokens (B, L, N)."""
    return routing.heads, routing.groups, routing.tokens


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected magnitude; refuses what is trivial or not finite."""
    assert output.shape == expected.shape
    assert output.isfinite().all() and expected.isfinite().all()
    scale = expected.abs().max().item()
    assert scale > 1e-2 and expected.std().item() > 1e-3, "the output is trivial"
    return (output.double() - expected.double()).abs().max().item() / scale


def multiply_in_one_kernel(patch: pytest.MonkeyPatch, precisions: frozenset[torch.dtype]) -> None:
    """Let oneDNN's products, with what follows them, be taken in these precisions alone, on any CPU."""
    for name in ("IN_ONE_KERNEL", "ACTIVATED_IN_ONE_KERNEL"):
        patch.setattr(layers, name, precisions)
