"""What the routers say along sampling trajectories, so that thresholds can be tried without the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dydit.config import DyDiTConfig
from dydit.costs import BlockCost, outer_macs, static_macs
from dydit.diffusion import Sampler
from dydit.dynamic.compute_loss import deployed_cost
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError
from dydit.export.logits import check_numbers, timestep_logits
from dydit.export.thresholds import Thresholds
from dydit.models.embeddings import check_texts
from dydit.routing.gates import logit
from dydit.shapes import ModelShape


@dataclass(frozen=True)
class Start:
    """Where the trajectories of a calibration set begin.

    Attributes:
        noise: (n, C, height, width).
        labels: (n,), or texts (n, M, context_dim); with guidance the sampler adds as many without one.
        seed: of both, and of the noise that DDPM adds.
    """

    noise: Tensor
    labels: Tensor
    seed: int

    @classmethod
    def draw(cls, model: DyDiT, samples: int, seed: int, texts: Tensor | None = None) -> Start:
        """Drawn on the CPU, so that every device starts from the same; on the model's device and dtype.

        Args:
            texts: (m, M, context_dim) for a model that takes text, one sample after another round and round.

        Raises:
            ConfigError: no samples, no texts where the model takes some, or texts where it takes none.
            ShapeError: texts of another width.
        """
        shape, weight = model.shape, next(model.parameters())
        if samples < 1:
            raise ConfigError(f"{samples} calibration samples", expected="at least 1")
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(samples, shape.in_channels, *shape.sample_size, generator=generator).to(weight)
        if shape.takes_text:
            return cls(noise, _texts_for(shape, texts, samples).to(weight), seed)
        if texts is not None:
            raise ConfigError("texts for a model that takes class labels", expected="none")
        labels = torch.randint(shape.num_classes, (samples,), generator=generator)
        return cls(noise, labels.to(weight.device), seed)

    def walk(self, sampler: Sampler, model: Any, null_label: int | Tensor | None) -> Tensor:
        """The samples (n, C, height, width) that ``model(x, t, y)`` draws from here."""
        generator = torch.Generator().manual_seed(self.seed)
        return sampler.sample(model, self.noise, self.labels, null_label, generator)


def _texts_for(shape: ModelShape, texts: Tensor | None, samples: int) -> Tensor:
    if texts is None or not len(texts):
        raise ConfigError(
            "a model that takes text, without any",
            expected="texts as its encoder gives them",
            remedy="give some with --texts",
        )
    check_texts(texts, len(texts), shape.context_dim)
    return texts[torch.arange(samples, device=texts.device) % len(texts)]


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of the model: latents x (B, C, height, width), timestep, labels or texts y, and its output.

    With guidance B holds both halves. ``position`` is that of the timestep among the sampler's.
    """

    position: int
    x: Tensor
    t: float
    y: Tensor
    output: Tensor


@dataclass(frozen=True, eq=False)
class Recording:
    """The calls of trajectories, and the logits behind every decision in them.

    Attributes:
        calls: R of them, in order.
        samples: what the trajectories end in (n, C, height, width).
        heads: width logits (S, L, H) at the sampler's timesteps; groups: (S, L, G); +inf is always on.
        tokens: token logits (R, B, L, N); +inf without a token router.
        shape, routing: the model's.
    """

    calls: tuple[ModelCall, ...]
    samples: Tensor
    heads: Tensor
    groups: Tensor
    tokens: Tensor
    shape: ModelShape
    routing: DyDiTConfig

    def kept_tokens(self, thresholds: Thresholds) -> Tensor:
        """Number of tokens that enter the MLP in each call and sample: (R, B, L) int64."""
        return (self.tokens > logit(thresholds.tokens)).sum(-1)

    def ratio(self, thresholds: Thresholds) -> float:
        """Deployed MACs over the static backbone's, mean over calls and samples, had the decisions been
        taken at ``thresholds`` on these very logits."""
        return self._ratio(thresholds, self.kept_tokens(thresholds))

    def capacity_ratio(self, thresholds: Thresholds, capacities: Tensor) -> float:
        """The same with a fixed number of tokens (S, L) per timestep and block."""
        return self._ratio(thresholds, capacities.long().to(self.tokens.device)[self.positions].unsqueeze(1))

    @property
    def positions(self) -> list[int]:
        """Of each call's timestep among the sampler's (R,)."""
        return [call.position for call in self.calls]

    def macs_per_timestep(self, thresholds: Thresholds) -> np.ndarray:
        """Deployed MACs per sample at each timestep (S,) of the sampler, mean over its calls and samples."""
        macs = self._macs(thresholds, self.kept_tokens(thresholds)).double().mean(1).cpu().numpy()  # (R,)
        positions = np.asarray(self.positions)
        return np.array([macs[positions == i].mean() for i in range(len(self.heads))])

    def _ratio(self, thresholds: Thresholds, kept: Tensor) -> float:
        mean: float = self._macs(thresholds, kept).double().mean().item()
        return mean / static_macs(self.shape)

    def _macs(self, thresholds: Thresholds, kept: Tensor) -> Tensor:
        """Of each call and sample (R, B)."""
        cut = logit(thresholds.width)
        heads, groups = (
            (logits > cut).sum(-1)[self.positions].unsqueeze(1) for logits in (self.heads, self.groups)
        )  # (R, 1, L)
        return outer_macs(self.shape) + self._cost.executed(heads, groups, kept).sum(-1)

    @cached_property
    def _cost(self) -> BlockCost:
        return deployed_cost(self.shape, self.routing)


def record(
    model: DyDiT, sampler: Sampler, start: Start, title: str = "", progress: bool = False
) -> Recording:
    """Sample with the masked model at its thresholds, and keep what its routers say.

    Args:
        title, progress: of a bar over the calls, shown when it takes more than a second.

    Raises:
        ScheduleError: a router gives NaN; names it and its block.
    """
    positions = {t: i for i, t in enumerate(sampler.timesteps)}
    calls: list[ModelCall] = []
    tokens: list[Tensor] = []
    with evaluating(model), call_bar(sampler, title, progress) as bar:

        def observed(x: Tensor, t: float, y: Tensor) -> Tensor:
            output, routing = model(x, t, y, return_routing=True)
            calls.append(ModelCall(positions[t], x, t, y, output))
            tokens.append(routing.logits.tokens)
            bar.update()
            return output

        heads, groups = timestep_logits(model, sampler.timesteps)
        samples = start.walk(sampler, observed, model.null_label)
    logits = torch.stack(tokens)
    check_numbers({"token_router": logits})
    return Recording(tuple(calls), samples, heads, groups, logits, model.shape, model.routing_config)


def call_bar(sampler: Sampler, title: str, progress: bool) -> Any:
    """A bar over the calls of one trajectory, for what takes more than a second."""
    total = len(sampler.call_timesteps)
    return tqdm(total=total, desc=title, unit="call", delay=1, disable=None if progress else True)


@contextmanager
def evaluating(model: DyDiT) -> Iterator[None]:
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)
