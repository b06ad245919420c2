"""A whole small benchmark: what it measures, what it writes, and when."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_builders import SMALL

import dydit.benchmark.run as running
from dydit.benchmark.measure import Point, time_calls
from dydit.benchmark.order import rotated, spread
from dydit.benchmark.peaks import measure_memory
from dydit.benchmark.results import Benchmark, Case
from dydit.benchmark.run import commit_of, run_benchmark
from dydit.benchmark.settings import BenchSettings, CaseSettings
from dydit.benchmark.storage import JSON_NAME, load_benchmark
from dydit.benchmark.subject import make_subject
from dydit.benchmark.whole_run import _in_turns
from dydit.costs import static_macs
from dydit.errors import DyditError
from dydit.models.dit import DiT
from dydit.runtime.packing import block_bytes


def test_every_network_is_measured_in_every_round(measured: tuple[Benchmark, Path]) -> None:
    found, folder = measured
    assert load_benchmark(folder / JSON_NAME) == found
    assert [(case.dtype, case.batch) for case in found.cases] == [
        ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2),
    ]  # fmt: skip
    names = {"static", "masked", "exact", "capacity", "all_on"}
    for case in found.cases:
        assert len(case.rounds) == 3 and len(set(case.timesteps)) == 3
        assert [r.timestep for r in case.rounds] == list(case.timesteps)
        assert all(set(r.ms) == names and min(r.ms.values()) > 0 for r in case.rounds)
        assert len({next(iter(r.ms)) for r in case.rounds}) == 3, "no network always runs first"


def test_the_ideal_is_what_was_counted(measured: tuple[Benchmark, Path]) -> None:
    found, _ = measured
    with torch.device("meta"):
        shape = DiT.from_preset("DiT-S/2", depth=2, sample_size=8).shape
    for case in found.cases:
        assert case.macs["static"] == (case.batch * static_macs(shape),) * 3
        for mode in ("exact", "capacity"):
            assert case.counted[mode] == case.macs[mode][0]
            assert case.capacity_difference is not None and 0 < case.capacity_difference < 1
            assert 1.4 < case.ideal(mode) < 2.8
            assert 0.3 < case.kept[mode] < 1.0
            expected = case.speedup(mode).median / case.ideal(mode)
            assert case.share(mode).median == pytest.approx(expected, rel=0.5)


def test_whole_runs_pack_from_nothing(measured: tuple[Benchmark, Path]) -> None:
    found, _ = measured
    for case in found.cases:
        run = case.whole_run
        assert run is not None
        assert (run.steps, run.sampler, run.guidance_scale) == (4, "ddim", 1.0)
        assert all(len(ms) == 2 and min(ms) > 0 for ms in run.ms.values())
        assert set(run.ms) == {"static", "exact", "capacity"}
        assert 1.4 < run.ideal("exact") < 2.8
        for packs in run.packs.values():
            assert packs["misses"] >= sum(case.subnetworks)
            assert packs["hits"] + packs["misses"] == 4 * case.depth
            assert 0 < packs["bytes"] <= packs["schedule_bytes"]


def test_what_was_measured_is_kept_when_the_rest_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure = running.measure_points

    def broken(points: Sequence[Point], settings: BenchSettings) -> Iterator[Case]:
        if points[0].batch == 2:
            raise KeyboardInterrupt
        return measure(points, settings)

    monkeypatch.setattr(running, "measure_points", broken)
    threads = torch.get_num_threads()
    settings = BenchSettings(**SMALL, batches=(1, 2), dtypes=("fp32",), threads=1)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(settings, tmp_path / "bench")
    found = load_benchmark(tmp_path / "bench" / JSON_NAME)
    assert found.finished is None and [case.batch for case in found.cases] == [1]
    assert "Not complete" in (tmp_path / "bench" / "bench.md").read_text()
    assert torch.get_num_threads() == threads


def test_a_finished_benchmark_stays_until_the_next_one_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = BenchSettings(**SMALL, batches=(1, 2), dtypes=("fp32",), modes=("exact",))
    first = run_benchmark(settings, tmp_path)

    def broken(points: Sequence[Point], settings: BenchSettings) -> Iterator[Case]:
        if points[0].batch == 2:
            raise KeyboardInterrupt
        return measure(points, settings)

    with monkeypatch.context() as patch:
        measure = running.measure_points
        patch.setattr(running, "measure_points", broken)
        with pytest.raises(KeyboardInterrupt):
            run_benchmark(settings.model_copy(update={"seed": 1}), tmp_path)
    assert load_benchmark(tmp_path / JSON_NAME) == first
    second = run_benchmark(settings.model_copy(update={"seed": 1}), tmp_path)
    assert load_benchmark(tmp_path / JSON_NAME) == second != first


@pytest.mark.parametrize(("sweep", "grows"), [("batch", 5), ("tokens", 3), ("depth", 2)])
def test_a_sweep_measures_static_model_and_engine_along_it(
    monkeypatch: pytest.MonkeyPatch, sweep: Any, grows: int, tmp_path: Path
) -> None:
    measure = running.measure_points

    def together(points: Sequence[Point], settings: BenchSettings) -> Iterator[Case]:
        assert len(points) == grows
        return measure(points, settings)

    monkeypatch.setattr(running, "measure_points", together)
    small = {**SMALL, "rounds": 1, "memory": True}
    settings = BenchSettings(**small, sweep=sweep, dtypes=("fp32",), modes=("exact",), batches=(1,))
    cases = run_benchmark(settings, tmp_path / "bench").cases
    places = [getattr(case, sweep) for case in cases]
    assert places == sorted(set(places)) and len(places) == grows
    for case in cases:
        assert set(case.rounds[0].ms) == {"static", "exact"}
        assert case.capacity_difference is None
        assert case.memory is None
    assert (tmp_path / "bench" / "bench.png").stat().st_size > 5000


def test_compiled_networks_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[Any] = []

    def without_a_compiler(network: Any = None, **options: Any) -> Any:  # graphs as ever, run without codegen
        if network is None:
            return lambda wrapped: without_a_compiler(wrapped, **options)
        compiled.append(network)
        return real(network, **{**options, "backend": "eager", "mode": None, "options": None})

    real = torch.compile
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    settings = BenchSettings(
        **{**SMALL, "depth": 1, "rounds": 1}, compile=True, dtypes=("fp32",), modes=("capacity",),
        batches=(2,), sweep="depth", whole_run=2,
    )  # fmt: skip
    (case,) = run_benchmark(settings, tmp_path / "bench").cases
    assert case.rounds[0].ms["capacity"] > 0
    assert case.whole_run is not None and case.whole_run.ideal("capacity") > 1
    assert any(isinstance(network, DiT) for network in compiled) and len(compiled) > 1


def test_cases_take_turns_each_round_starts_with_another_network_and_a_timestep_warms_up() -> None:
    calls: list[tuple[str, float]] = []

    def network(name: str) -> Any:
        return lambda _x, t, _y: calls.append((name, t))

    inputs = {t: (torch.zeros(1), torch.zeros(1)) for t in (9.0, 1.0)}
    cases = [({name: network(name) for name in names}, inputs) for names in ("abc", "de")]
    abc, de = time_calls(cases, rounds=5, warmup=1, title="t")
    for rounds in (abc, de):
        assert [r.timestep for r in rounds] == [9.0, 9.0, 9.0, 1.0, 1.0]
    assert ["".join(r.ms) for r in abc] == ["abc", "bca", "cab", "abc", "bca"]
    assert ["".join(r.ms) for r in de] == ["de", "ed", "de", "ed", "de"]
    order = [2 * "abc", 2 * "de", "bca", "ed", "cab", "de", 2 * "abc", 2 * "ed", "bca", "de"]
    assert "".join(name for name, _ in calls) == "".join(order)


def test_timesteps_lie_in_the_middle_of_equal_parts() -> None:
    assert spread(tuple(range(50)), 3) == (8, 25, 41)
    assert spread((3.0, 2.0), 5) == (3.0, 2.0)
    assert rotated(["a", "b"], 3) == ["b", "a"]


def test_memory_is_measured_in_processes_of_its_own() -> None:
    settings = BenchSettings(**{**SMALL, "memory": True}, modes=("exact",), memory_budget=20_000_000)
    case = CaseSettings(dtype="fp32", batches=(1, 2), depth=2, sample_size=8)
    subject = make_subject(settings, case)
    found = measure_memory(subject, settings, case)
    weights = sum(p.nbytes for p in subject.model.backbone.parameters())
    for batch in (1, 2):
        assert found[batch].budget == 20_000_000
        assert found[batch].peaks["static"] > 0.9 * weights
        assert -weights / 2 < found[batch].above_static("exact") < 4 * weights
    assert np.all([found[2].peaks[name] >= found[1].peaks[name] for name in ("static", "exact")])
    adapter, blocks = subject.model.adapter, subject.model.adapter.blocks(subject.model.backbone)
    assert block_bytes(adapter.attention(blocks[0]), adapter.mlp(blocks[0])) < 20_000_000


def test_a_process_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = BenchSettings(**SMALL, modes=("exact",))
    case = CaseSettings(dtype="fp32", batches=(1,), depth=2, sample_size=8)
    subject = make_subject(settings, case)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\ncat > /dev/null\necho 'Traceback' >&2\necho 'no room' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(DyditError, match="memory of static ended with status 3: no room.*no-memory") as told:
        measure_memory(subject, settings, case)
    assert "\n" not in str(told.value)


def test_whole_runs_take_turns_in_starting() -> None:
    """Also where all steps are one turn."""
    started: list[str] = []

    def run(name: str) -> Iterator[None]:
        started.append(name)
        yield

    runs = {name: partial(run, name) for name in ("static", "exact", "capacity")}
    for round_index in range(3):
        _in_turns(runs, [1], round_index)
    assert started[::3] == ["static", "exact", "capacity"]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")
def test_the_commit_is_of_a_checkout_that_tracks_the_package(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package, installed = tmp_path / "package", tmp_path / "environment"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "__init__.py").touch()
    git("init")
    assert commit_of(package) is None
    git("add", "package")
    git("commit", "-m", "one")
    commit = commit_of(package)
    assert commit is not None and len(commit) >= 10 and not commit.endswith("dirty")
    assert commit_of(installed) is None, "a checkout of something else, around it"
    (tmp_path / "notes.txt").touch()
    assert commit_of(package) == commit
    (package / "new.py").touch()
    assert commit_of(package) == f"{commit}-dirty"
