"""Whole sampling runs: the packing of weights is part of their time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial

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
    """Sampling runs of the static backbone and of each engine side by side, step by step in turns.

    On a GPU run after run: to wait for it after every step would part what runs together, such as a step and
    what is prepared for the next. Engines have nothing packed at first, unless they record. Which tokens they
    keep is seen in a run of its own, the same again: what it holds on to would lie between the products'
    results in the C library's heap, and these take longer then.

    Args:
        batch: images.
        static_macs: of one call of the backbone at this batch size.
    """
    calls, steps = subject.sampler.call_timesteps, len(subject.sampler.timesteps)
    runs = {
        name: partial(subject.trajectory, variants.networks[name], batch)
        for name in (STATIC, *variants.engines)
    }
    if settings.compile:  # every graph is made before the clock runs; CUDA graphs in a timestep's second call
        passes = 2 if any(engine.records for engine in variants.engines.values()) else 1
        for run in [*runs.values()] * passes:
            deque(run(), maxlen=0)
    ms: dict[str, list[float]] = {name: [] for name in runs}
    packs: dict[str, dict[str, int]] = {}
    for round_index in range(settings.whole_rounds):
        before = {mode: _emptied(engine) for mode, engine in variants.engines.items()}
        turns = [steps] if subject.device.type == "cuda" else [1] * steps
        bar = tqdm(turns, desc=f"whole runs, batch {batch}", unit="turn")
        for name, time in _in_turns(runs, bar, round_index).items():
            ms[name].append(time)
        packs = {mode: _since(before[mode], engine) for mode, engine in variants.engines.items()}
    macs = {STATIC: len(calls) * static_macs}
    for mode, engine in variants.counting.items():
        with recording_kept(engine) as (call, kept):
            deque(subject.trajectory(call, batch), maxlen=0)
            counts = zip(calls, kept(), strict=True)
        macs[mode] = sum(engine_table(variants.engines[mode], t, tokens).total for t, tokens in counts)
    return WholeRun(
        sampler=subject.settings.name, steps=steps,
        guidance_scale=subject.settings.guidance_scale,
        ms={name: tuple(values) for name, values in ms.items()}, macs=macs, packs=packs,
    )  # fmt: skip


def _in_turns(
    runs: Mapping[str, Callable[[], Iterator[object]]], turns: Iterable[int], first: int
) -> dict[str, float]:
    """Milliseconds of each run, so many steps in a turn: what the machine does meanwhile is shared by all.

    The run at ``first``, counted round and round, is the first of the first turn, the next one of the second.
    """
    under_way = {name: run() for name, run in runs.items()}
    total = dict.fromkeys(runs, 0.0)
    for index, steps in enumerate(turns, first):
        for name in rotated(list(runs), index):
            call = {name: partial(_advance, under_way[name], steps)}
            total[name] += measure_interleaved(call, rounds=1, warmup=0)[name][0]
    return total


def _advance(run: Iterator[object], steps: int) -> None:
    for _ in range(steps):
        next(run)


def _emptied(engine: SubnetEngine) -> dict[str, int]:
    """Drop what an engine has packed; its counters, which go on."""
    if not engine.records:  # recordings belong to what is made before the clock runs
        engine.to(next(engine.parameters()).device)  # packings are stale after a move, also to the same place
    return asdict(engine.pack_statistics())


def _since(before: dict[str, int], engine: SubnetEngine) -> dict[str, int]:
    now, sizes = asdict(engine.pack_statistics()), ("bytes", "schedule_bytes")
    return {name: now[name] if name in sizes else now[name] - before[name] for name in now}
