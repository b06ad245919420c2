"""The networks that are compared: one set of weights, run as backbone, masked model and engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dydit.benchmark.results import ALL_ON, MASKED, STATIC
from dydit.benchmark.settings import BenchSettings
from dydit.benchmark.subject import Subject
from dydit.models.embeddings import batch_timesteps
from dydit.runtime.engine import SubnetEngine
from dydit.runtime.graphs import CudaGraphs


@dataclass(frozen=True)
class Variants:
    """Networks by name, called as ``network(x, t, y)`` with t one number.

    Attributes:
        networks: static backbone, masked model, engine per mode, engine with all masks on.
        engines: mode -> the engine among them.
        counting: mode -> an engine that is not compiled, to look inside of; the same one where none is.
    """

    networks: dict[str, Callable[[Tensor, float, Tensor], Tensor]]
    engines: dict[str, SubnetEngine]
    counting: dict[str, SubnetEngine] = field(default_factory=dict)


def make_variants(subject: Subject, settings: BenchSettings) -> Variants:
    """Everything that the settings ask to compare; a sweep asks for static backbone and engines alone.

    Raises:
        ConfigError: the memory budget is smaller than one block.
    """
    engines: dict[str, SubnetEngine] = {mode: make_engine(subject, settings, mode) for mode in settings.modes}
    counting = engines
    if settings.compile:
        plain = settings.model_copy(update={"compile": False})
        counting = {mode: make_engine(subject, plain, mode) for mode in settings.modes}
    networks: dict[str, Any] = {STATIC: dense(subject.static, settings.compile), **engines}
    if settings.sweep is None:
        networks[MASKED] = dense(subject.model, settings.compile)
        networks[ALL_ON] = make_engine(subject, settings, "exact", all_on=True)
    return Variants(networks, engines, counting)


def make_engine(subject: Subject, settings: BenchSettings, mode: str, all_on: bool = False) -> SubnetEngine:
    """An engine on the subject's own weights."""
    options: dict[str, Any] = {"mode": mode, **({"compile": True} if settings.compile else {})}
    return SubnetEngine(
        subject.model,
        subject.all_on() if all_on else subject.schedule,
        memory_budget=settings.memory_budget,
        verify=False,  # the schedule was made from these weights, or verified when they were loaded
        **options,
    )


def dense(network: nn.Module, compiled: bool) -> Callable[[Tensor, float, Tensor], Tensor]:
    """A dense network without gradients; t reaches it as a tensor, on which no compiler specialises.

    Compiled and on a GPU, it is also recorded as a CUDA graph, as engines are.
    """
    run: Any = torch.compile(network, dynamic=False) if compiled else network
    graphs = CudaGraphs()

    @torch.no_grad()
    def call(x: Tensor, t: float, y: Tensor) -> Tensor:
        inputs = x, batch_timesteps(t, x), y
        return graphs("dense", run, *inputs) if compiled and x.is_cuda else run(*inputs)

    return call
