"""Measurements made up for the arithmetic of benchmarks, and the settings of a small one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from dydit.benchmark.peaks import peaks_of
from dydit.benchmark.results import Benchmark, Case, Machine, Memory, Round, WholeRun
from dydit.benchmark.settings import BenchSettings

SMALL: dict[str, Any] = {"subject": "DiT-S/2", "depth": 2, "sample_size": 8, "rounds": 3, "memory": False}


def peaks_in_this_process(_: Any, input: str, **__: Any) -> Any:
    """What a process of its own would say, without its start; in place of ``subprocess.run``."""
    return SimpleNamespace(returncode=0, stdout=json.dumps(peaks_of(json.loads(input))))


def made_up_case(**changes: Any) -> Case:
    """Two timesteps with ideals 2 and 4, where the engine takes a quarter more time than they say."""
    times = {500.0: {"static": 80.0, "exact": 50.0}, 100.0: {"static": 80.0, "exact": 25.0}}
    further = {"masked": 88.0, "all_on": 81.6}
    fields: dict[str, Any] = {
        "dtype": "fp32", "batch": 2, "rows": 2, "sample_size": (32, 32), "tokens": 256, "depth": 28,
        "timesteps": (500.0, 100.0), "macs": {"static": (800, 800), "exact": (400, 200)},
        "counted": {"exact": 400}, "kept": {"exact": 0.5}, "subnetworks": (3, 5), "view_share": 0.25,
        "rounds": tuple(Round(timestep=t, ms={**ms, **further}) for t, ms in times.items()),
        "memory": Memory(peaks={"static": 3_000_000, "exact": 4_500_000}, budget=2_000_000),
        "whole_run": WholeRun(
            sampler="ddim", steps=50, guidance_scale=1.0, ms={"static": (4000.0,), "exact": (2000.0,)},
            macs={"static": 40_000, "exact": 16_000},
            packs={"exact": {"hits": 7, "misses": 5, "bytes": 1_000_000, "evictions": 3, "views": 1}},
        ),
        **changes,
    }  # fmt: skip
    return Case(**fields)


def made_up(*cases: Case, finished: str | None = "2026-01-02T00:00:00+00:00", **settings: Any) -> Benchmark:
    """A benchmark of DiT-XL/2 on two threads."""
    chosen = BenchSettings(subject="DiT-XL/2", **settings)
    return Benchmark(
        command=chosen.command,
        settings=chosen.model_dump(mode="json"),
        machine=Machine(
            processor="A processor", device=chosen.device, threads=2, cores=2, system="Linux x86_64",
            python="3.11", torch="2", dydit="0", load=0.25, instructions="AVX2",
            commit="0123456789",
        ),
        started="2026-01-01T00:00:00+00:00",
        finished=finished,
        cases=cases or (made_up_case(),),
    )  # fmt: skip
