"""The whole benchmark: case after case, saved after each; a sweep's in turns."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import dydit
from dydit.benchmark.measure import Point, count_static, measure_points
from dydit.benchmark.peaks import measure_memory
from dydit.benchmark.results import Benchmark, Case, Machine
from dydit.benchmark.settings import BenchSettings, CaseSettings, plan_cases
from dydit.benchmark.storage import check_folder, holds_finished_benchmark, save_benchmark
from dydit.benchmark.subject import make_subject, preset_depth
from dydit.benchmark.variants import make_variants
from dydit.compute.machine import processor_name
from dydit.processor import HAS_AMX


def run_benchmark(settings: BenchSettings, out: str | Path) -> Benchmark:
    """Measure, and write ``bench.json``, ``bench.md`` and ``bench.png`` into ``out`` after every case.

    The cases of a sweep in one dtype are timed together, and saved after that. A complete benchmark that is
    there stays until this one is complete.

    Raises:
        DyditError: settings, model or folder cannot be used, or counted and analytic MACs differ.
    """
    cases = plan_cases(settings, preset_depth(settings))
    check_folder(out)
    replaces = holds_finished_benchmark(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    machine = _machine(settings.device)
    if machine.threads != machine.cores:  # as the environment says, which the command shall say too
        settings = settings.model_copy(update={"threads": machine.threads})
    found = Benchmark(
        command=settings.command + _other_device(settings),
        settings=settings.model_dump(mode="json"),
        machine=machine,
        started=_now(),
    )

    def save(case: Case) -> None:
        nonlocal found
        found = found.model_copy(update={"cases": (*found.cases, case)})
        if not replaces:
            save_benchmark(found, out)

    try:
        for together in _groups(settings, cases):
            _measure(settings, together, save)
    finally:
        torch.set_num_threads(threads)
    found = found.model_copy(update={"finished": _now()})
    save_benchmark(found, out)
    return found


def _other_device(settings: BenchSettings) -> str:
    """The option that keeps the command from taking this machine's GPU."""
    return " --device cpu" if settings.device == "cpu" and torch.cuda.is_available() else ""


def _groups(settings: BenchSettings, cases: Sequence[CaseSettings]) -> list[list[CaseSettings]]:
    """Cases whose subjects are in memory together: those of a sweep in one dtype, else each alone.

    Compiled ones never: as many networks would be more graphs than torch.compile makes of one function.
    """
    if settings.sweep is None or settings.compile:
        return [[case] for case in cases]
    return [[case for case in cases if case.dtype == dtype] for dtype in settings.dtypes]


def _measure(settings: BenchSettings, cases: Sequence[CaseSettings], save: Callable[[Case], None]) -> None:
    """All batch sizes of some subjects, which are built once and dropped afterwards."""
    if settings.compile:
        torch.compiler.reset()  # graphs of the case before hold its weights
    points = [point for case in cases for point in _points(settings, case)]
    for together in [points] if settings.sweep else [[point] for point in points]:
        for found in measure_points(together, settings):
            save(found)
    del points, together
    gc.collect()  # an engine and what it holds refer to each other


def _points(settings: BenchSettings, case: CaseSettings) -> list[Point]:
    subject = make_subject(settings, case)
    variants = make_variants(subject, settings)  # first, as it refuses a budget that is too small
    memory = measure_memory(subject, settings, case) if settings.memory and settings.sweep is None else {}
    static = count_static(subject)
    return [Point(subject, variants, case.dtype, batch, static, memory.get(batch)) for batch in case.batches]


def _machine(device: str) -> Machine:
    return Machine(
        processor=processor_name(device),
        device=device,
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        dydit=dydit.__version__,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        instructions=_instructions() if device == "cpu" else None,
        commit=commit_of(Path(dydit.__file__).parent),
    )


def _instructions() -> str:
    return torch.backends.cpu.get_cpu_capability() + (" with AMX" if HAS_AMX else "")


def commit_of(package: Path) -> str | None:
    """Of the git checkout that tracks a package's folder; "-dirty" where the folder was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it is a checkout of something around it
        changed = git("status", "--porcelain", ".")
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
