"""The routers of one block: timestep -> heads and groups (TDW), token -> MLP or not (SDT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydit.config import DyDiTConfig
from dydit.costs import RouterShape
from dydit.precision import without_autocast
from dydit.routing.gates import logistic_noise, nested_logits, threshold_gate, training_gate
from dydit.shapes import ModelShape


class WidthRouter(nn.Module):
    """One Linear from the timestep embedding to a score per component (DyDiT, equation of TDW).

    Args:
        hidden_size: D of the timestep embedding.
        components: heads H or groups G.
        always_on: the first component has no score and is always on.
        open_bias: initial bias of the scores; large enough that everything is on at step 0.
    """

    def __init__(self, hidden_size: int, components: int, always_on: bool, open_bias: float) -> None:
        super().__init__()
        self.always_on = always_on
        self.router = nn.Linear(hidden_size, components - int(always_on))
        nn.init.zeros_(self.router.weight)
        nn.init.constant_(self.router.bias, open_bias)

    def forward(self, timestep: Tensor) -> Tensor:
        """Logits (B, components) for timestep embeddings (B, D); +inf for what is always on."""
        with without_autocast(timestep):
            logits = self.router(timestep.to(self.router.weight.dtype))
        if not self.always_on:
            return logits
        return torch.cat([logits.new_full((logits.shape[0], 1), torch.inf), logits], dim=1)


class TokenRouter(nn.Sequential):
    """Linear, ReLU, Linear: one logit per token, from the tokens after the attention residual."""

    def __init__(self, hidden_size: int, ratio: int, open_bias: float) -> None:
        hidden = token_hidden(hidden_size, ratio)
        score = nn.Linear(hidden, 1)
        nn.init.zeros_(score.weight)
        nn.init.constant_(score.bias, open_bias)
        super().__init__(nn.Linear(hidden_size, hidden), nn.ReLU(), score)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (..., N) for tokens (..., N, D).

        Under autocast the first layer, which has nearly all of the work, runs in its number format, as the
        layers do that the tokens come from; the score does not.
        """
        first, activation, score = self
        hidden = activation(first(tokens))
        with without_autocast(tokens):
            return score(hidden.to(score.weight.dtype)).squeeze(-1)


def token_hidden(hidden_size: int, ratio: int) -> int:
    """Hidden units of the token router: D/ratio, at least 1."""
    return max(1, hidden_size // ratio)


class BlockRouters(nn.Module):
    """All routers of one block; a router that the config switches off is absent and its gates are open."""

    def __init__(self, shape: ModelShape, config: DyDiTConfig) -> None:
        super().__init__()
        self.config = config
        D = shape.hidden_size
        self.head_router = self.group_router = self.token_router = None
        if config.head_routing:
            self.head_router = WidthRouter(D, shape.num_heads, config.always_on, config.open_bias)
        if config.mlp_routing:
            self.group_router = WidthRouter(D, shape.mlp_groups, config.always_on, config.open_bias)
        if config.token_routing:
            self.token_router = TokenRouter(D, config.token_router_ratio, config.token_open_bias)
        self.num_heads, self.num_groups = shape.num_heads, shape.mlp_groups

    def gate(
        self,
        logits: Tensor,
        threshold: float,
        noise: Tensor | None = None,
        temperature: Tensor | float | None = None,
    ) -> Tensor:
        """Gates of the logits: noisy and differentiable in training, thresholded in evaluation.

        Args:
            logits: any shape.
            threshold: score above which a gate is open in evaluation.
            noise: in training, of a shape that broadcasts to ``logits``; None: drawn from torch's global
                generator.
            temperature: in training; None: the config's.
        """
        if not self.training:
            return threshold_gate(logits, threshold)
        temperature = self.config.temperature if temperature is None else temperature
        return training_gate(logits, temperature, noise, threshold)

    def width_gate(
        self, logits: Tensor, noise: Tensor | None = None, temperature: Tensor | float | None = None
    ) -> Tensor:
        """Gates of the logits (..., K) of heads or groups; see ``gate``.

        Nested, the components share one draw, the first one's. With logits that never rise the gates are then
        a prefix, whose length chance decides, and each is still open with the probability of its own score:
        the expected width in training does not shrink with the number of components.
        """
        if self.training and self.config.nested:
            noise = logistic_noise(logits[..., :1]) if noise is None else noise[..., :1]
        return self.gate(logits, self.config.threshold, noise, temperature)

    def head_logits(self, timestep: Tensor) -> Tensor:
        """Logits (B, H) from timestep embeddings (B, D); +inf for what is always on."""
        return self._width_logits(self.head_router, timestep, self.num_heads)

    def group_logits(self, timestep: Tensor) -> Tensor:
        """Logits (B, G) from timestep embeddings (B, D); +inf for what is always on."""
        return self._width_logits(self.group_router, timestep, self.num_groups)

    def token_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, N) from tokens (B, N, D); +inf without a token router."""
        if self.token_router is None:
            return tokens.new_full(tokens.shape[:-1], torch.inf)
        return self.token_router(tokens)

    def head_gates(self, timestep: Tensor) -> Tensor:
        """Gates (B, H) from timestep embeddings (B, D)."""
        return self.width_gate(self.head_logits(timestep))

    def group_gates(self, timestep: Tensor) -> Tensor:
        """Gates (B, G) from timestep embeddings (B, D)."""
        return self.width_gate(self.group_logits(timestep))

    def token_gates(self, tokens: Tensor) -> Tensor:
        """Gates (B, N) from tokens (B, N, D)."""
        return self.gate(self.token_logits(tokens), self.config.token_threshold)

    def _width_logits(self, router: WidthRouter | None, timestep: Tensor, components: int) -> Tensor:
        if router is None:
            return timestep.new_full((timestep.shape[0], components), torch.inf)
        logits = router(timestep)
        return nested_logits(logits) if self.config.nested else logits


def router_shape(shape: ModelShape, config: DyDiTConfig) -> RouterShape:
    """What the routers of one block cost (see ``dydit.costs``)."""
    spared = int(config.always_on)
    hidden = token_hidden(shape.hidden_size, config.token_router_ratio)
    return RouterShape(
        head_scores=shape.num_heads - spared if config.head_routing else 0,
        group_scores=shape.mlp_groups - spared if config.mlp_routing else 0,
        token_hidden=hidden if config.token_routing else 0,
    )
