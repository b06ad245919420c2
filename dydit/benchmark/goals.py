"""What the deployed engine must reach on DiT-XL/2 at half the compute, and whether a benchmark met it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from dydit.benchmark.results import ALL_ON, Benchmark, Case
from dydit.benchmark.tables import megabytes

SUBJECT, RATIO = "DiT-XL/2", 0.5
LEAST_SHARE = {("fp32", 2): 0.93, ("fp32", 8): 0.97, ("bf16", 2): 0.86, ("bf16", 8): 0.92}
MOST_ALL_ON = {2: 1.03, 8: 1.02}
CPU_THREADS = 2  # the goals are set for two cores
RUN_MARGIN = 0.03  # that the share of a whole run may lie below the single call's
SWEEP_NOISE = 0.01  # a fall of the share from one point to the next that is none
LEAST_GPU_SPEEDUP, GPU_SHARE, GPU_BATCH = 1.73, 0.90, 64


@dataclass(frozen=True)
class Verdict:
    """One goal, held against one measurement.

    Attributes:
        goal: what is asked, in words.
        mode: of the engine; empty where it does not matter.
        measured, wanted: in the unit of ``show``.
        at_least: whether more is better.
        show: how to print a figure.
    """

    goal: str
    mode: str
    measured: float
    wanted: float
    at_least: bool
    show: Callable[[float], str]

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    @property
    def words(self) -> str:
        """``met``, or by how much it is missed."""
        if self.met:
            return "met"
        by = self.show(abs(self.measured - self.wanted))
        return "just missed" if by == self.show(0.0) else f"missed by {by}"

    def row(self) -> tuple[str, ...]:
        """Goal, mode, bound, figure and verdict."""
        bound = f"{'≥' if self.at_least else '≤'} {self.show(self.wanted)}"
        return self.goal, self.mode, bound, self.show(self.measured), self.words


def judge(found: Benchmark) -> list[Verdict]:
    """Every goal that the benchmark says something about; none of another subject.

    Parts of the subject, or other numbers of threads, count in sweeps alone, which compare it with itself.
    """
    settings = found.settings
    if (settings["subject"], settings["ratio"]) != (SUBJECT, RATIO) or settings["path"] is not None:
        return []
    if settings["sweep"]:
        return [verdict for mode in _modes(found) for verdict in _sweep_goals(found, mode)]
    on_cpu = found.machine.device == "cpu"
    if not found.is_whole or (on_cpu and found.machine.threads != CPU_THREADS):
        return []
    goals = _cpu_goals if on_cpu else _gpu_goals
    return [verdict for case in found.cases for mode in case.modes for verdict in goals(found, case, mode)]


def _cpu_goals(found: Benchmark, case: Case, mode: str) -> Iterator[Verdict]:
    where = f"{case.dtype}, batch {case.batch}"
    share = case.share(mode).median
    if wanted := LEAST_SHARE.get((case.dtype, case.batch)):
        yield Verdict(f"share of ideal, {where}", mode, share, wanted, True, _three)
    ratio = case.time_ratio(ALL_ON)
    if ratio and case.batch in MOST_ALL_ON and mode == case.modes[0]:
        goal, most = f"all masks on, time over static, {where}", MOST_ALL_ON[case.batch]
        yield Verdict(goal, "exact", ratio.median, most, False, _three)
    if run := case.whole_run:
        yield Verdict(
            f"share in whole runs of {run.steps} steps, {where}", mode, run.share(mode), share - RUN_MARGIN,
            True, _three,
        )  # fmt: skip
    if memory := case.memory:
        yield Verdict(
            f"peak memory above static, {where}",
            mode,
            memory.above_static(mode),
            memory.budget,
            False,
            megabytes,
        )


def _gpu_goals(found: Benchmark, case: Case, mode: str) -> Iterator[Verdict]:
    guided = case.rows == 2 * case.batch
    if case.dtype == "bf16" and case.batch == GPU_BATCH and guided and found.settings["compile"]:
        where = f"bf16, batch {case.batch} with guidance, compiled"
        yield Verdict(f"speed-up, {where}", mode, case.speedup(mode).median, LEAST_GPU_SPEEDUP, True, _times)
        yield Verdict(f"share of ideal, {where}", mode, case.share(mode).median, GPU_SHARE, True, _three)


def _sweep_goals(found: Benchmark, mode: str) -> Iterator[Verdict]:
    """One verdict per line of a sweep: how far the share comes to lie below that of less work, at most."""
    sweep = found.settings["sweep"]
    lines: dict[tuple[str, int], list[Case]] = {}
    for case in found.cases:
        lines.setdefault((case.dtype, 0 if sweep == "batch" else case.batch), []).append(case)
    for (dtype, batch), cases in lines.items():
        ordered = sorted(cases, key=lambda case: getattr(case, sweep))
        shares = [case.share(mode).median for case in ordered]
        if len(shares) > 1:
            fall = max(best - share for best, share in zip(accumulate(shares, max), shares, strict=True))
            where = dtype if sweep == "batch" else f"{dtype}, batch {batch}"
            yield Verdict(
                f"fall of the share as {sweep} grows, {where}",
                mode,
                fall,
                SWEEP_NOISE,
                False,
                _three,
            )


def _modes(found: Benchmark) -> tuple[str, ...]:
    return found.cases[0].modes if found.cases else ()


def _three(value: float) -> str:
    return f"{value:.3f}"


def _times(value: float) -> str:
    return f"{value:.2f}×"
