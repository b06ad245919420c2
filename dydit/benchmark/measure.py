"""Cases: MACs and time of single calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dydit.benchmark.order import rotated, spread
from dydit.benchmark.results import STATIC, Case, Memory, Round
from dydit.benchmark.settings import BenchSettings, Dtype
from dydit.benchmark.subject import Subject, recording_kept
from dydit.benchmark.variants import Variants
from dydit.benchmark.whole_run import time_runs
from dydit.compute.analytic import static_table
from dydit.compute.complete import Complete
from dydit.compute.counting import MacReport
from dydit.compute.engine import count_engine, engine_table
from dydit.compute.latency import measure_interleaved
from dydit.compute.on_meta import count_on_meta, like
from dydit.compute.table import MacTable
from dydit.errors import DyditError
from dydit.export.capacity import relative_difference
from dydit.runtime.engine import SubnetEngine

CALL_TIMESTEPS = 3  # timesteps whose calls are timed; each is another set of subnetworks

Inputs = tuple[Tensor, Tensor]
Network = Callable[[Tensor, float, Tensor], Tensor]


@dataclass(frozen=True)
class Point:
    """One subject at one batch size, to be measured.

    Attributes:
        variants: the networks to compare.
        batch: images.
        static_macs: of the backbone for one sample (``count_static``).
        memory: measured elsewhere.
    """

    subject: Subject
    variants: Variants
    dtype: Dtype
    batch: int
    static_macs: int
    memory: Memory | None = None


def measure_points(points: Sequence[Point], settings: BenchSettings) -> Iterator[Case]:
    """Everything about some points; their calls are timed in turns, so that they compare with each other.

    Raises:
        DyditError: counted and analytic MACs differ.
    """
    counted = [_count_point(point, settings) for point in points]
    calls = [(point.variants.networks, inputs) for point, (inputs, _) in zip(points, counted, strict=True)]
    batches = ",".join(dict.fromkeys(str(point.batch) for point in points))
    title = f"{points[0].dtype}, batch {batches}"
    times = time_calls(calls, settings.rounds, 2 if settings.compile else 1, title)
    for point, (_, case_of), rounds in zip(points, counted, times, strict=True):
        case = case_of(rounds=rounds)
        if settings.whole_run:
            static_macs = case.rows * point.static_macs
            run = time_runs(point.subject, point.variants, settings, point.batch, static_macs)
            case = case.model_copy(update={"whole_run": run})
        yield case


def _count_point(point: Point, settings: BenchSettings) -> tuple[dict[float, Inputs], Callable[..., Case]]:
    """Latents and labels of a point's calls by timestep; and its case, but for what the clock says."""
    subject, variants = point.subject, point.variants
    first = next(iter(variants.counting.values()))
    calls = subject.calls(first, point.batch)
    timesteps = spread(subject.sampler.timesteps, min(CALL_TIMESTEPS, settings.rounds))
    inputs = {t: calls[t] for t in timesteps}
    rows = len(inputs[timesteps[0]][0])
    macs: dict[str, tuple[int, ...]] = {STATIC: (rows * point.static_macs,) * len(timesteps)}
    counted: dict[str, int] = {}
    kept: dict[str, float] = {}
    outputs: dict[str, list[Tensor]] = {}
    for mode, engine in variants.counting.items():
        timed = variants.engines[mode]
        counted[mode] = _count(timed, timesteps[0], inputs[timesteps[0]])
        outputs[mode], tables, kept[mode] = _executed(engine, timed, inputs)
        macs[mode] = tuple(table.total for table in tables)
    plan, shape = subject.schedule, subject.model.shape
    return inputs, partial(
        Case,
        dtype=point.dtype, batch=point.batch, rows=rows,
        sample_size=shape.sample_size, tokens=shape.tokens, depth=shape.depth,
        timesteps=timesteps, macs=macs, counted=counted, kept=kept,
        capacity_difference=_difference(outputs),
        subnetworks=plan.subnetworks_by_block, view_share=plan.view_share,
        memory=point.memory,
    )  # fmt: skip


def count_static(subject: Subject) -> int:
    """MACs of the static backbone for one sample, counted by fvcore without computing.

    Raises:
        DyditError: the closed form says otherwise.
    """
    build = like(subject.model)
    report = count_on_meta(lambda: Complete(build()))
    _check("static backbone", static_table(subject.model.shape), report)
    return report.total


def time_calls(
    cases: Sequence[tuple[Mapping[str, Network], Mapping[float, Inputs]]],
    rounds: int,
    warmup: int,
    title: str,
) -> list[tuple[Round, ...]]:
    """Time every network of every case in every round, and give each case's rounds.

    Cases take turns, so that what the machine does meanwhile is shared by all; of a case, another network is
    the first in every round. A timestep's rounds follow each other.

    Args:
        cases: networks by name, and their latents and labels by timestep.
        rounds: timed calls of each network, in all.
        warmup: untimed calls before a timestep's first round. Its subnetworks are then packed, as they are in
            every call but their first; a compiler may want a second call.
        title: of the progress bar.
    """
    found: list[list[Round]] = [[] for _ in cases]
    for index in tqdm(range(rounds), desc=title, unit="round"):
        for (networks, inputs), seen in zip(cases, found, strict=True):
            t = [*inputs][index * len(inputs) // rounds]
            x, y = inputs[t]
            calls: dict[str, Callable[[], Any]] = {
                name: partial(networks[name], x, t, y) for name in rotated([*networks], index)
            }
            warm = bool(seen) and seen[-1].timestep == t
            ms = measure_interleaved(calls, rounds=1, warmup=0 if warm else warmup)
            seen.append(Round(timestep=t, ms={name: values[0] for name, values in ms.items()}))
    return [tuple(seen) for seen in found]


def _count(engine: SubnetEngine, t: float, inputs: Inputs) -> int:
    """MACs of one call, by fvcore.

    In a thread of its own: a trace leaves small pieces in the memory that the C library keeps for its thread.
    Products that later lay between them would take some percent longer than in a process that samples.

    Raises:
        DyditError: the closed form says otherwise.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        call = thread.submit(count_engine, engine, inputs[0], t, inputs[1]).result()
    _check(f"engine, mode {engine.mode}", call.analytic, call.counted, len(inputs[0]))
    return call.counted.total


def _check(name: str, analytic: MacTable, counted: MacReport, rows: int = 1) -> None:
    found = [f"{operator} ran {times} times, uncounted" for operator, times in counted.unsupported.items()]
    found += analytic.differences(counted.table)
    if found:
        raise DyditError(
            f"{name}, {rows} samples: analytic and counted MACs differ in {len(found)} places: {found[0]}",
            expected="equal figures",
            remedy="report it with this command line",
        )


def _executed(
    engine: SubnetEngine, timed: SubnetEngine, inputs: Mapping[float, Inputs]
) -> tuple[list[Tensor], list[MacTable], float]:
    """Output and MACs of the call at each timestep, and the share of tokens that these calls kept.

    Args:
        engine: to look inside of.
        timed: perhaps compiled, when nothing fills its batches up.
    """
    with recording_kept(engine) as (call, kept):
        outputs = [call(x, t, y) for t, (x, y) in inputs.items()]
        _check_numbers(engine, outputs)
        counts = kept()
    tables = [engine_table(timed, t, count) for t, count in zip(inputs, counts, strict=True)]
    return outputs, tables, float(np.mean(counts)) / engine.shape.tokens


def _check_numbers(engine: SubnetEngine, outputs: Sequence[Tensor]) -> None:
    if not all(output.isfinite().all() for output in outputs):
        raise DyditError(
            f"outputs of mode {engine.mode} in {outputs[0].dtype} that are not finite",
            expected="numbers",
            remedy="measure in another --dtype",
        )


def _difference(outputs: Mapping[str, Sequence[Tensor]]) -> float | None:
    """‖capacity − exact‖ / ‖exact‖, mean over the calls; None where only one mode ran."""
    if len(outputs) < 2:
        return None
    pairs = zip(outputs["capacity"], outputs["exact"], strict=True)
    return float(np.mean([relative_difference(capacity, exact).item() for capacity, exact in pairs]))
