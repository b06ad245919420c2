"""docs/benchmarks.md: every benchmark that was kept, with the goals held against it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dydit.benchmark.goals import SUBJECT, judge
from dydit.benchmark.page import NOTES, page
from dydit.benchmark.results import Benchmark
from dydit.benchmark.storage import load_benchmark
from dydit.benchmark.tables import Table
from dydit.errors import DataError

INTRODUCTION = """\
# Benchmarks

What the deployed engine saves on the clock, beside what it saves in MACs. `python
tools/render_benchmarks.py` renders this page from the JSON files in [benchmarks/](benchmarks); each is the
`bench.json` that the command beside its figures wrote, named after machine and subject.

A preset is benchmarked with random weights, for time does not ask what was learnt. Its routers are set so
that the deployed compute is what was asked for, with equal shares of heads, groups and tokens: the masks of
each block are scattered and change with the timestep a little at a time, as those of trained routers do;
the token routers' biases come from the scores that a forward of this very model gives, so which tokens are
kept depends on the data. In whole runs the network stands beside the best linear prediction for noise,
which keeps the latents at unit variance."""
_GOAL_HEADER = ("goal", "mode", "bound", "measured", "verdict", "machine", "measured by")


def read_collection(folder: str | Path) -> dict[str, Benchmark]:
    """Name of each JSON file without its ending -> what it holds, in order of name.

    Raises:
        DataError: there is none, one is damaged, or one is not finished.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(
            f"{folder} holds no JSON", expected="copies of bench.json, one per machine and subject"
        )
    found = {path.stem: load_benchmark(path) for path in paths}
    for name, benchmark in found.items():
        if benchmark.finished is None:
            raise DataError(f"{name}.json is not complete", remedy=f"run again: {benchmark.command}")
    return found


def render_collection(collection: dict[str, Benchmark], pictures: str = "benchmarks") -> str:
    """The page.

    Args:
        pictures: folder of ``NAME.png``, as the page refers to it.
    """
    parts = [INTRODUCTION, "## Goals", _goals(list(collection.values())), "## Measurements", NOTES]
    parts += [page(found, f"{pictures}/{name}.png", level=3).rstrip() for name, found in collection.items()]
    return "\n\n".join(parts) + "\n"


def _goals(collection: Sequence[Benchmark]) -> str:
    """The table of goals, and how many are met."""
    verdicts = [(verdict, found) for found in collection for verdict in judge(found)]
    if not verdicts:
        return f"None of the measurements below is of {SUBJECT} as a whole at half the compute."
    met = sum(verdict.met for verdict, _ in verdicts)
    rows = [(*verdict.row(), found.machine.name, f"`{found.command}`") for verdict, found in verdicts]
    return (
        f"For {SUBJECT} with half the compute deployed; {met} of {len(verdicts)} are met.\n\n"
        + Table(_GOAL_HEADER, tuple(rows)).markdown()
    )
