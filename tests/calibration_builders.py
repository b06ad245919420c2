"""Models whose scores are spread out, samplers for them, and recordings of random logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from core_builders import TIMESTEPS, randomize, small_dydit, small_inputs

from dydit.config import DyDiTConfig, SamplerConfig
from dydit.diffusion import Sampler, make_sampler
from dydit.dynamic.dydit import DyDiT
from dydit.export.recording import ModelCall, Recording
from dydit.shapes import ModelShape

STEPS, BATCH = 2, 1
SHAPE: ModelShape = small_dydit(mixed=False).shape


@torch.no_grad()
def routed_dydit(seed: int = 0, depth: int = 3, **overrides: Any) -> DyDiT:
    """A model whose scores are spread out, over timesteps, components and tokens, as a trained one's."""
    config = overrides.pop("config", DyDiTConfig(mlp_groups=16, token_router_ratio=4))
    model = small_dydit(seed, config=config, mixed=False, depth=depth, hidden_size=64, **overrides)
    x, y = small_inputs(model.shape, batch=len(TIMESTEPS), seed=seed)
    for i, routers in enumerate(model.routers):
        randomize(routers, seed=50 * seed + i, std=0.2)
        if routers.token_router is not None:
            logits = model(x, torch.tensor(TIMESTEPS), y, return_routing=True)[1].logits.tokens[:, i]
            score = routers.token_router[2]
            score.weight.mul_(2 / logits.std())
            score.bias.sub_(logits.mean()).mul_(2 / logits.std())
    return model


def sampler_of(
    model: DyDiT, name: str = "ddim", guidance_scale: float = 1.5, steps: int | None = None
) -> Sampler:
    # With few steps, DDPM's last ones are so long that a random model's latents leave every scale.
    steps = steps or (12 if name == "ddpm" else 6)
    settings = SamplerConfig(name=name, steps=steps, guidance_scale=guidance_scale)
    return make_sampler(settings, model.shape.learn_sigma)


def some_recording(seed: int, scale: float = 2.0, widths: str = "apart", **routing: bool) -> Recording:
    """Random logits; ``widths``: "apart", or "equal" for a single one that opens or closes everything."""
    rng = np.random.default_rng(seed)
    config = DyDiTConfig(token_router_ratio=4, **routing)  # type: ignore[arg-type]

    def logits(*size: int) -> torch.Tensor:
        return torch.from_numpy(scale * rng.standard_normal(size)).float()

    heads, groups = logits(STEPS, SHAPE.depth, SHAPE.num_heads), logits(STEPS, SHAPE.depth, SHAPE.mlp_groups)
    if widths == "equal":
        heads[:], groups[:] = 1.0, 1.0
    heads[..., 0] = groups[..., 0] = torch.inf
    if not config.head_routing:
        heads[:] = torch.inf
    if not config.mlp_routing:
        groups[:] = torch.inf
    tokens = logits(STEPS, BATCH, SHAPE.depth, SHAPE.tokens)
    if not config.token_routing:
        tokens[:] = torch.inf
    nothing = torch.zeros(0)
    calls = tuple(ModelCall(i, nothing, float(i), nothing, nothing) for i in range(STEPS))
    return Recording(calls, nothing, heads, groups, tokens, SHAPE, config)
