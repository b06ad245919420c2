"""One small benchmark, measured once."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_builders import SMALL

from dydit.benchmark.results import Benchmark
from dydit.benchmark.run import run_benchmark
from dydit.benchmark.settings import BenchSettings


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Benchmark, Path]:
    """A benchmark of two blocks in fp32 and bf16 with whole runs, and its folder."""
    folder = tmp_path_factory.mktemp("bench") / "small"
    settings = BenchSettings(**SMALL, batches=(1, 2), whole_run=4, whole_rounds=2)
    return run_benchmark(settings, folder), folder
