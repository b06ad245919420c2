"""Whole sampling runs: the packing of weights is part of their time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from dydit.benchmark.order import rotated
from dydit.benchmark.results import STATIC, WholeRun
from dydit.benchmark.settings import BenchSettings
from dydit.benchmark.subject import Subject, recording_kept
from dydit.benchmark.variants import Variants
from dydit.compute.engine import engine_table
from dydit.compute.latency import measure_interleaved
from dydit.runtime.engine import SubnetEngine


def time_runs(
    subject: Subject, variants: Variants, settings: BenchSettings, batch: int, static_macs: int
) -> WholeRun:
    """Sampling runs of the static backbone and of each engine in turns, engines with nothing packed at first.

    Args:
        batch: images.
        static_macs: of one call of the backbone at this batch size.
    """
    steps = subject.sampler.call_timesteps
    static = variants.networks[STATIC]
    runs: dict[str, Callable[[], object]] = {STATIC: lambda: subject.sample(static, batch)}
    for mode, engine in variants.engines.items():
        runs[mode] = _plain(subject, engine, batch) if settings.compile else _Recorded(subject, engine, batch)
    if settings.compile:  # every graph is made before the clock runs
        for run in runs.values():
            run()
    ms: dict[str, list[float]] = {name: [] for name in runs}
    packs: dict[str, dict[str, int]] = {}
    for index in tqdm(range(settings.whole_rounds), desc=f"whole runs, batch {batch}", unit="round"):
        for name in rotated(list(runs), index):
            timed = variants.engines.get(name)
            before = {} if timed is None else _emptied(timed)
            ms[name] += measure_interleaved({name: runs[name]}, rounds=1, warmup=0)[name]
            if timed is not None:
                packs[name] = _since(before, timed)
    macs = {STATIC: len(steps) * static_macs}
    for mode, engine in variants.counting.items():
        seen = runs[mode]
        if not isinstance(seen, _Recorded):  # inside of a compiled engine nothing can be seen
            seen = _Recorded(subject, engine, batch)
            seen()
        kept = zip(steps, seen.kept(), strict=True)
        macs[mode] = sum(engine_table(engine, t, tokens).total for t, tokens in kept)
    return WholeRun(
        sampler=subject.settings.name, steps=len(subject.sampler.timesteps),
        guidance_scale=subject.settings.guidance_scale,
        ms={name: tuple(values) for name, values in ms.items()}, macs=macs, packs=packs,
    )  # fmt: skip


class _Recorded:
    """A sampling run of an engine that notes what its token routers said: a few calls of Python per step."""

    kept: Callable[[], list[np.ndarray]]

    def __init__(self, subject: Subject, engine: SubnetEngine, batch: int) -> None:
        self.subject, self.engine, self.batch = subject, engine, batch

    def __call__(self) -> None:
        with recording_kept(self.engine) as (call, self.kept):
            self.subject.sample(call, self.batch)


def _plain(subject: Subject, network: Any, batch: int) -> Callable[[], object]:
    return lambda: subject.sample(network, batch)


def _emptied(engine: SubnetEngine) -> dict[str, int]:
    """Drop what an engine has packed; its counters, which go on."""
    if not engine.records:  # recordings belong to what is made before the clock runs
        engine.to(next(engine.parameters()).device)  # packings are stale after a move, also to the same place
    return asdict(engine.pack_statistics())


def _since(before: dict[str, int], engine: SubnetEngine) -> dict[str, int]:
    now = asdict(engine.pack_statistics())
    return {name: now[name] if name == "bytes" else now[name] - before[name] for name in now}
