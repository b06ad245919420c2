"""A benchmark in rows: the same cells in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dydit.benchmark.results import ALL_ON, MASKED, Benchmark, Case
from dydit.compute.latency import Spread
from dydit.report.results import DASH, measured

MEGABYTE = 1e6


@dataclass(frozen=True)
class Table:
    """Cells under their headings; every row is as long as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a Markdown table, no trailing newline."""
        rule = ["---"] * len(self.header)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (self.header, rule, *self.rows))


def calls_table(found: Benchmark) -> Table:
    """Single calls: one row per case and mode of the engine."""
    varying = _varying(found.cases)
    header = (
        *varying, "batch", "dtype", "mode", "static ms", "engine ms", "speed-up (quartiles)", "ideal",
        "share of ideal (quartiles)", "all on / static", "masked / static", "peak memory above static",
    )  # fmt: skip
    return Table(header, tuple(_call_row(case, mode, varying) for case in found.cases for mode in case.modes))


def runs_table(found: Benchmark) -> Table:
    """Whole sampling runs; no rows where none was measured."""
    varying = _varying(found.cases)
    header = (
        *varying, "batch", "dtype", "mode", "run", "static s", "engine s", "speed-up (quartiles)", "ideal",
        "share of ideal", "blocks packed, reused", "views", "copied", "packed at the end",
    )  # fmt: skip
    cases = [case for case in found.cases if case.whole_run is not None]
    return Table(header, tuple(_run_row(case, mode, varying) for case in cases for mode in case.modes))


def spread_text(spread: Spread | None, digits: int = 3, several: bool = True) -> str:
    """Median (quartiles), or a dash; the median alone where it is not one of several figures."""
    if spread is None:
        return DASH
    if not several:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


def megabytes(size: float | None) -> str:
    """Bytes in MB (10⁶), or a dash."""
    return DASH if size is None else f"{size / MEGABYTE:,.0f} MB"


def _call_row(case: Case, mode: str, varying: Sequence[str]) -> tuple[str, ...]:
    memory = None if case.memory is None else case.memory.above_static(mode)
    told = partial(spread_text, several=case.repeated)
    return (
        *_place(case, varying), mode, measured(case.median_ms("static")), measured(case.median_ms(mode)),
        told(case.speedup(mode), 2), f"{case.ideal(mode):.2f}", told(case.share(mode)),
        told(case.time_ratio(ALL_ON)), told(case.time_ratio(MASKED)), megabytes(memory),
    )  # fmt: skip


def _run_row(case: Case, mode: str, varying: Sequence[str]) -> tuple[str, ...]:
    run = case.whole_run
    assert run is not None
    packs = run.packs[mode]
    seconds = [measured(_median(run.ms[name]) / 1e3) for name in ("static", mode)]
    told = spread_text(run.speedup(mode), 2, several=len(run.ms[mode]) > 1)
    return (
        *_place(case, varying), mode, f"{run.steps} steps of {run.sampler}, guidance {run.guidance_scale:g}",
        *seconds, told, f"{run.ideal(mode):.2f}", f"{run.share(mode):.3f}",
        f"{packs['misses']}, {packs['hits']}", str(packs["views"]),
        megabytes(packs.get("copied")), megabytes(packs["bytes"]),
    )  # fmt: skip


def _place(case: Case, varying: Sequence[str]) -> tuple[str, ...]:
    return *(str(getattr(case, name)) for name in varying), str(case.batch), case.dtype


def _varying(cases: Sequence[Case]) -> list[str]:
    return [name for name in ("tokens", "depth") if len({getattr(case, name) for case in cases}) > 1]


def _median(values: Sequence[float]) -> float:
    return Spread.of(values).median
