"""docs/benchmarks.md: every benchmark that was kept, with the goals held against it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dydit.benchmark.goals import RUN_MARGIN, SUBJECT, SWEEP_NOISE, judge
from dydit.benchmark.page import NOTES, page
from dydit.benchmark.results import Benchmark
from dydit.benchmark.storage import load_benchmark
from dydit.benchmark.tables import Table
from dydit.errors import DataError
from dydit.report.results import DASH

INTRODUCTION = """\
# Benchmarks

What the deployed engine saves on the clock, beside what it saves in MACs. `python
tools/render_benchmarks.py` renders this page from the JSON files in [benchmarks/](benchmarks); each is the
`bench.json` that the command beside its figures wrote, named after machine and subject.

A preset is benchmarked with random weights, as run time does not depend on trained values. Its routers are
set so that the deployed compute is what was asked for, with equal shares of heads, groups and tokens. The
masks of each block change with the timestep a little at a time and are scattered, so that no slice is a
view: a harder case than the trained digits model of [export.md](export.md#ordering). The token routers'
biases come from the scores that a forward of this very model gives, so which tokens are kept depends on the
data; how far capacity's output lies from exact's says nothing about a trained model. In whole runs the
network's output is scaled down and added to the optimal linear noise prediction for Gaussian data, so that
latents keep unit variance, as with a trained model.

AMD EPYC (AVX512) and the Xeon with AMX have instructions for bfloat16, the other two have none. Machines are
shared, and memory is what neighbours slow down most: the static DiT-XL/2 in bfloat16 took 455 to 614 ms per
call at batch 2 within two hours on the Xeon with AMX (`dydit bench DiT-XL/2 --batch 2 --dtype bf16 --rounds
12 --no-memory`, time after time). Shares of small batches move with it, as what the engine does not narrow,
adaLN's weights above all, is read from memory in every call. Figures are of the engine at their date:

- in its form for CPUs ([the block, twice](architecture.md#the-block-twice)), which takes less time per call:
  those of both Xeons, and of AMD EPYC (AVX512) all but float32 at batch 8, float32 against depth, and against
  tokens;
- with half as many sizes of MLPs of more than 512 tokens in bfloat16, which saves memory: those at full depth
  on AMD EPYC (AVX512) and on the Xeon with AMX, outside of sweeps;
- with modulations computed for several timesteps at once in whole runs ([sampling
  runs](engine.md#sampling-runs)), which takes less time: those at full depth on AMD EPYC (AVX512) and on the
  Xeon with AMX, but float32 at batch 8.

Memory is that of a run as samplers make it on the Xeon with AMX in bfloat16 at batch 2; all other figures of
it are of single calls, without the modulations of several timesteps, which take up to 12 MB in bfloat16 and
25 MB in float32."""
_SPEEDUPS = "Time of the static backbone over the engine's; the commands stand beside the measurements below."
_SPEEDUP_HEADER = (
    "subject", "machine", "dtype", "batch", "rounds", "mode", "speed-up, single calls", "ideal",
    "speed-up, whole runs", "ideal of whole runs",
)  # fmt: skip
_BOUNDS = f"""\
The bound of whole runs is the share of single calls less {RUN_MARGIN}. As batch, tokens or depth grow, the
share may fall by {SWEEP_NOISE}. Peak memory may lie above the static model's by the budget of packed weights.
Differences are of unrounded figures."""
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
    benchmarks = list(collection.values())
    parts = [INTRODUCTION]
    if (speedups := _speedups(benchmarks)).rows:
        parts += ["## Speed-up", _SPEEDUPS, speedups.markdown()]
    parts += ["## Goals", _goals(benchmarks), "## Measurements", NOTES]
    parts += [page(found, f"{pictures}/{name}.png", level=3).rstrip() for name, found in collection.items()]
    return "\n\n".join(parts) + "\n"


def _speedups(collection: Sequence[Benchmark]) -> Table:
    """Time of the static backbone over the engine's; rows of whole subjects alone, without sweeps."""
    rows = [
        (
            found.settings["subject"], found.machine.name,
            f"{case.dtype}, compiled" if found.settings["compile"] else case.dtype, str(case.batch),
            str(found.settings["rounds"]), mode,
            f"{case.speedup(mode).median:.2f}×",
            f"{case.ideal(mode):.2f}×",
            DASH if case.whole_run is None else f"{case.whole_run.speedup(mode).median:.2f}×",
            DASH if case.whole_run is None else f"{case.whole_run.ideal(mode):.2f}×",
        )
        for found in collection if found.is_whole for case in found.cases for mode in case.modes
    ]  # fmt: skip
    return Table(_SPEEDUP_HEADER, tuple(rows))


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
        + f"\n\n{_BOUNDS}"
    )
