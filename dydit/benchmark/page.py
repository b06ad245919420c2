"""A benchmark as a Markdown page."""

from __future__ import annotations

from dydit.benchmark.results import Benchmark, Case
from dydit.benchmark.tables import calls_table, megabytes, runs_table

NOTES = """\
Every network is called once per round, in an order that rotates; ratios are of the same round: median and
quartiles at each timestep, and their mean over the timesteps (a speed-up is one over a mean). In a sweep
the cases in one dtype take turns round by round, those of several depths or numbers of tokens only where
nothing is compiled. Ideal is static over engine in MACs of these timesteps together, by the closed form for
the tokens that were kept; fvcore counts a call of each mode, and the benchmark stops where the closed form
of that call differs. Share is the measured speed-up over the ideal one. An engine's subnetwork is packed
before it is timed, except in whole runs, which start with nothing packed (but what CUDA graphs hold) and
take turns step by step (on a GPU, run by run). *All on* is an engine with every head, group and token on:
where it takes less than the static backbone, the engine's own forms of attention and products are faster
than PyTorch's, and the share gains from that too. *Masked* is the trained form. Peak memory is of processes
with one network each, the engines' over every timestep of the schedule, never compiled."""


def page(found: Benchmark, figure: str | None = None, level: int = 1) -> str:
    """The whole page.

    Args:
        figure: file name of the picture beside it.
        level: of the heading.
    """
    parts = [f"{'#' * level} {title(found)}", f"`{found.command}`", conditions(found)]
    if found.finished is None:
        parts.append("**Not complete:** the benchmark was interrupted, or is still running.")
    if found.cases:
        parts.append(calls_table(found).markdown())
        runs = runs_table(found)
        if runs.rows:
            parts += ["Whole sampling runs:", runs.markdown()]
        if figure is not None:
            parts.append(f"![{title(found)}: measured and ideal]({figure})")
    if level == 1:
        parts.append(NOTES)
    return "\n\n".join(parts) + "\n"


def title(found: Benchmark) -> str:
    """Subject, machine, and what sets this benchmark apart from others of the two."""
    settings = found.settings
    extras: list[str] = [*dict.fromkeys(case.dtype for case in found.cases)]
    if settings["sweep"]:
        extras.append(f"{settings['sweep']} swept")
    if settings["sweep"] != "batch" and found.cases:
        extras.append("batch " + " and ".join(map(str, sorted({case.batch for case in found.cases}))))
    if settings["sweep"] != "depth" and settings["depth"]:
        extras.append(_count(settings["depth"], "block"))
    extras += ["compiled"] if settings["compile"] else []
    extras.append(_count(settings["rounds"], "round"))
    return ", ".join([f"{settings['subject']} on {found.machine.name}", *extras])


def conditions(found: Benchmark) -> str:
    """Sentences that say under which conditions all figures were measured."""
    machine, settings = found.machine, found.settings
    where = machine.device
    if where == "cpu":
        where = f"{_count(machine.threads, 'thread')} on {_count(machine.cores, 'CPU core')}"
    words = [
        f"{machine.name}, {where}, torch {machine.torch}, Python {machine.python}, {machine.system}, "
        f"dydit {machine.dydit}{_commit(machine.commit)}; {found.started[:10]}{_load(machine.load)}.",
        f"{_count(settings['rounds'], 'round')}; "
        f"{'everything' if settings['compile'] else 'nothing'} compiled.",
    ]
    if settings["path"] is None:
        words.append(f"Random weights; routers that deploy {settings['ratio']:g} of the static compute.")
    if found.cases:
        words += [_of_case(found.cases[0])]
        budgets = {case.memory.budget for case in found.cases if case.memory is not None}
        if budgets:
            words.append("Budget of packed weights: " + ", ".join(map(megabytes, sorted(budgets))) + ".")
    return " ".join(words)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _commit(commit: str | None) -> str:
    return "" if commit is None else f" ({commit})"


def _load(load: float | None) -> str:
    """How busy the machine was before: times on a busy one say little."""
    return "" if load is None else f", load average {load:g} before"


def _of_case(case: Case) -> str:
    kept = ", ".join(f"{case.kept[mode]:.0%} ({mode})" for mode in case.modes)
    height, width = case.sample_size
    halves = ", both halves of guidance in a call" if case.rows != case.batch else ""
    fewest, most = min(case.subnetworks), max(case.subnetworks)
    distinct = _count(most, "distinct mask")
    distinct = distinct if fewest == most else f"{fewest} to {distinct}"
    difference = case.capacity_difference
    differs = "" if difference is None else f" Capacity's output differs from exact's by {difference:.1%}."
    timesteps = ", ".join(f"{t:g}" for t in case.timesteps)
    return (
        f"First case: latent {height}×{width}, {case.tokens} tokens, {_count(case.depth, 'block')}{halves}; "
        f"timesteps {timesteps}; tokens kept: {kept}; {distinct} per block over the schedule, "
        f"{case.view_share:.0%} of them views.{differs}"
    )
