"""Goals held against measurements, and the page of all benchmarks."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_builders import made_up, made_up_case

from dydit.benchmark.collection import read_collection
from dydit.benchmark.goals import judge
from dydit.benchmark.results import Benchmark, Memory, Round
from dydit.benchmark.storage import JSON_NAME, save_benchmark
from dydit.errors import DataError, DyditError

REPOSITORY = Path(__file__).parents[2]


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", REPOSITORY / "tools" / "render_benchmarks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_share(share: float, **changes: Any) -> Any:
    """A case with an ideal of 2 of which ``share`` is realised, all masks on as fast as static."""
    ms = {"static": 100.0, "exact": 50.0 / share, "all_on": 100.0}
    rounds = (Round(timestep=500.0, ms=ms),)
    return made_up_case(rounds=rounds, **changes)


def test_goals_of_a_case() -> None:
    share, all_on, run, memory = judge(made_up(made_up_case()))
    assert (share.met, share.words) == (False, "missed by 0.130")
    assert (share.wanted, share.measured) == pytest.approx((0.93, 0.8))
    assert (all_on.met, all_on.words) == (True, "met")
    assert (run.met, run.wanted) == (True, pytest.approx(0.77))
    assert (memory.met, memory.row()[2:]) == (True, ("≤ 2 MB", "2 MB", "met"))


@pytest.mark.parametrize(
    ("dtype", "batch", "bound"), [("fp32", 2, 0.93), ("fp32", 8, 0.97), ("bf16", 2, 0.86), ("bf16", 8, 0.92)]
)
def test_the_bound_itself_is_enough(dtype: str, batch: int, bound: float) -> None:
    for share, met in ((bound + 1e-9, True), (bound - 1e-3, False)):
        verdict = judge(made_up(with_share(share, dtype=dtype, batch=batch)))[0]
        assert verdict.met is met


def test_memory_beyond_the_budget_is_missed() -> None:
    case = made_up_case(memory=Memory(peaks={"static": 0, "exact": 5_000_000}, budget=2_000_000))
    assert judge(made_up(case))[-1].words == "missed by 3 MB"


def test_only_the_whole_model_on_two_threads_is_judged() -> None:
    other = made_up()
    threads = other.machine.model_copy(update={"threads": 16})
    for found in (
        made_up(depth=4), made_up(sample_size=16), made_up(ratio=0.7),
        other.model_copy(update={"settings": {**other.settings, "subject": "DiT-S/2"}}),
        other.model_copy(update={"machine": threads}),
    ):  # fmt: skip
        assert judge(found) == []


@pytest.mark.parametrize(
    ("shares", "met"),
    [
        ((0.8, 0.85, 0.9), True),
        ((0.9, 0.895), True),
        ((0.9, 0.8), False),
        ((0.88, 0.9, 0.895, 0.889, 0.885), False),  # a little at a time
    ],
)
def test_the_share_must_not_fall_in_a_sweep(shares: tuple[float, ...], met: bool) -> None:
    cases = [with_share(share, depth=depth) for depth, share in enumerate(shares, 4)]
    (verdict,) = judge(made_up(*reversed(cases), sweep="depth"))
    assert verdict.met is met


def test_parts_and_sweeps_are_no_speedup_of_the_subject(tmp_path: Path) -> None:
    docs = collected(tmp_path, made_up(depth=4), made_up(with_share(0.9, depth=4), sweep="depth"))
    tool().render(docs, check=False)
    assert "## Speed-up" not in (docs / "benchmarks.md").read_text()


def test_goals_of_a_gpu() -> None:
    case = with_share(0.9 + 1e-9, dtype="bf16", batch=64, rows=128)
    speedup, share = judge(made_up(case, device="cuda", compile=True))
    assert speedup.met and share.met
    assert judge(made_up(case, device="cuda")) == []


def collected(folder: Path, *found: Benchmark) -> Path:
    """A docs folder that holds the benchmarks."""
    for i, benchmark in enumerate(found):
        save_benchmark(benchmark, folder / "bench")
        (folder / "docs" / "benchmarks").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "bench" / JSON_NAME, folder / "docs" / "benchmarks" / f"machine{i}.json")
    return folder / "docs"


def test_the_page_has_goals_commands_and_pictures(tmp_path: Path) -> None:
    docs = collected(tmp_path, made_up(), made_up(with_share(0.95), memory_budget=1))
    told = tool().render(docs, check=False)
    assert "2 pictures" in told
    text = (docs / "benchmarks.md").read_text()
    for words in ("missed by 0.130", "`dydit bench DiT-XL/2`", "`dydit bench DiT-XL/2 --memory-budget 1`",
                  "benchmarks/machine0.png", "6 of 8 are met",
                  "| exact | 2.13× | 2.67× | 2.00× | 2.50× |"):  # fmt: skip
        assert words in text
    assert (docs / "benchmarks" / "machine1.png").read_bytes().startswith(b"\x89PNG")
    tool().render(docs, check=True)
    (docs / "benchmarks.md").write_text(text.replace("0.130", "0.001"))
    with pytest.raises(DyditError, match="is not what its files render to"):
        tool().render(docs, check=True)


def test_a_measured_benchmark_renders(measured: tuple[Benchmark, Path], tmp_path: Path) -> None:
    docs = collected(tmp_path, measured[0])
    tool().render(docs, check=False)
    text = (docs / "benchmarks.md").read_text()
    assert measured[0].command in text and "None of the measurements" in text
    assert tool().render(docs, check=True)


def test_derived_figures_and_pictures_are_checked_too(tmp_path: Path) -> None:
    docs = collected(tmp_path, made_up())
    tool().render(docs, check=False)
    (file,) = (docs / "benchmarks").glob("*.json")
    whole = file.read_text()
    file.write_text(whole.replace('"ideal": ', '"ideal": 9'))
    with pytest.raises(DyditError, match=rf"{file.name} is not what its files render to"):
        tool().render(docs, check=True)
    tool().render(docs, check=False)
    assert file.read_text() == whole
    file.with_suffix(".png").rename(docs / "benchmarks" / "old.png")
    for check in (False, True):
        with pytest.raises(DyditError, match="old.png without old.json"):
            tool().render(docs, check)
    (docs / "benchmarks" / "old.png").unlink()
    with pytest.raises(DyditError, match=r"\.png is not what its files render to"):
        tool().render(docs, check=True)


def test_what_is_not_finished_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no JSON"):
        read_collection(tmp_path)
    docs = collected(tmp_path, made_up(finished=None))
    with pytest.raises(DataError, match="not complete; run again: dydit bench DiT-XL/2"):
        read_collection(docs / "benchmarks")


def test_the_page_in_the_documentation_is_what_its_files_render_to() -> None:
    page, folder = REPOSITORY / "docs" / "benchmarks.md", REPOSITORY / "docs" / "benchmarks"
    files = sorted(folder.glob("*.json"))
    assert page.is_file() == bool(files), "a page without files, or files without a page"
    if files:
        assert tool().render(REPOSITORY / "docs", check=True)
