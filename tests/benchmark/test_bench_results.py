"""Shares and ratios from measured values, the file that keeps them, and what is written from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_builders import made_up, made_up_case
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from dydit.benchmark import figures
from dydit.benchmark.figures import draw
from dydit.benchmark.page import page, title
from dydit.benchmark.results import Benchmark, Round
from dydit.benchmark.storage import JSON_NAME, check_folder, load_benchmark, save_benchmark
from dydit.benchmark.tables import calls_table, runs_table
from dydit.errors import DataError, OutputError


def test_speedup_and_ideal_are_those_of_all_timesteps_together() -> None:
    """As a sampling run would have it: a cheap timestep saves no more than it costs."""
    case = made_up_case()
    assert case.ideal("exact") == pytest.approx(1600 / 600)
    assert case.speedup("exact").median == pytest.approx(160 / 75)
    share = case.share("exact")  # of 2 at one timestep 1.6, of 4 at the other 3.2
    assert (share.low, share.median, share.high) == pytest.approx((0.8, 0.8, 0.8))


def test_ratios_are_paired_and_an_outlier_does_not_move_them() -> None:
    """A busy moment makes both networks slow, or one of them once."""
    times = [(80, 40, 500), (160, 80, 500), (80, 400, 500), (80, 20, 100), (40, 10, 100), (80, 22, 100)]
    rounds = tuple(Round(timestep=float(t), ms={"static": a, "exact": b}) for a, b, t in times)
    case = made_up_case(rounds=rounds, memory=None)
    assert case.speedup("exact").median == pytest.approx(1 / np.mean([1 / 2, 1 / 4]))
    assert case.speedup("exact").low < case.speedup("exact").median
    assert case.share("exact").median == pytest.approx(1.0)
    alone = made_up_case(rounds=rounds[:3], memory=None)  # a timestep that was not timed does not count
    assert alone.ideal("exact") == 2.0


@given(
    ms=st.lists(st.tuples(st.floats(1, 1e4), st.floats(1, 1e4)), min_size=1, max_size=9),
    macs=st.tuples(st.integers(10, 10**9), st.integers(10, 10**9)),
)
def test_the_share_is_the_speedup_over_the_ideal_at_one_timestep(
    ms: list[tuple[float, float]], macs: tuple[int, int]
) -> None:
    rounds = tuple(Round(timestep=1.0, ms={"static": a, "exact": b}) for a, b in ms)
    case = made_up_case(
        timesteps=(1.0,), macs={"static": macs[:1], "exact": macs[1:]}, rounds=rounds, memory=None
    )
    assert case.ideal("exact") == pytest.approx(macs[0] / macs[1])
    for told in ("low", "median", "high"):
        speedup = getattr(case.speedup("exact"), told)
        assert getattr(case.share("exact"), told) == pytest.approx(speedup / case.ideal("exact"))


def test_ratios_to_the_static_model_and_what_was_not_measured() -> None:
    case = made_up_case()
    ratios = case.time_ratio("all_on"), case.time_ratio("masked")
    assert [r.median for r in ratios if r is not None] == pytest.approx([1.02, 1.1])
    bare = made_up_case(rounds=tuple(Round(timestep=500.0, ms={"static": 2.0, "exact": 1.0}) for _ in "ab"))
    assert bare.time_ratio("all_on") is None
    assert bare.median_ms("masked") is None
    assert "–" in calls_table(made_up(bare)).rows[0]


def test_whole_runs_and_memory() -> None:
    case = made_up_case()
    run = case.whole_run
    assert run is not None and case.memory is not None
    assert (run.speedup("exact").median, run.ideal("exact"), run.share("exact")) == (2.0, 2.5, 0.8)
    assert case.memory.above_static("exact") == 1_500_000
    assert case.derived()["exact"]["bytes_above_static"] == 1_500_000
    (row,) = runs_table(made_up(case)).rows
    assert "5, 7" in row
    assert not runs_table(made_up(made_up_case(whole_run=None))).rows


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    found = made_up(made_up_case(), made_up_case(dtype="bf16", memory=None, whole_run=None))
    save_benchmark(found, tmp_path)
    assert load_benchmark(tmp_path / JSON_NAME) == found
    document = json.loads((tmp_path / JSON_NAME).read_text())
    assert document["format_version"] == 1
    assert document["cases"][0]["derived"]["exact"]["share"]["median"] == pytest.approx(0.8)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert found.command in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format_version=9), "format version 9"),
        (lambda d: d["cases"][0].update(batch="many"), "damaged"),
        (lambda d: d.update(cases=[3]), "damaged"),
        (lambda d: d["machine"].pop("torch"), "damaged"),
        (lambda d: d["settings"].update(sweep="width"), "damaged"),
        (lambda d: d["cases"][0].update(rounds=[]), "damaged"),
        (lambda d: d["cases"][0].update(dtype="int8"), "damaged"),
        (lambda d: d["cases"][0]["rounds"][0]["ms"].pop("exact"), "damaged.*rounds of other networks"),
        (lambda d: d["cases"][0]["rounds"][0]["ms"].update(exact=0.0), "damaged"),
        (lambda d: d["cases"][0]["rounds"][0].update(timestep=7.0), "damaged.*rounds at other timesteps"),
        (lambda d: d["cases"][0]["macs"].update(exact=[1]), "damaged.*MACs of other timesteps"),
        (
            lambda d: d["cases"][0]["macs"].update(exact=[0, 1]),
            "damaged: cases.0.macs.exact.0: .*greater than 0",
        ),
        (lambda d: d["cases"][0].update(kept={}), "damaged.*kept tokens of other modes"),
        (lambda d: d["cases"][0]["counted"].clear(), "damaged.*counts or kept tokens of other modes"),
        (lambda d: d["cases"][0]["whole_run"].update(packs={}), "damaged.*whole runs of other networks"),
        (lambda d: d["cases"][0]["whole_run"]["ms"].update(exact=[]), "damaged"),
        (lambda d: d["cases"][0]["whole_run"]["ms"].update(exact=[1.0, 2.0]), "of one network more than"),
        (lambda d: d.update(cases=[]), "damaged.*finished, without cases"),
    ],
)
def test_a_changed_file_is_refused_in_one_line(tmp_path: Path, change: Any, words: str) -> None:
    save_benchmark(made_up(), tmp_path)
    document = json.loads((tmp_path / JSON_NAME).read_text())
    change(document)
    (tmp_path / JSON_NAME).write_text(json.dumps(document))
    with pytest.raises(DataError, match=words) as told:
        load_benchmark(tmp_path / JSON_NAME)
    assert "\n" not in str(told.value)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_benchmark(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_benchmark(tmp_path / "text.json")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    save_benchmark(made_up(), tmp_path / "new")
    check_folder(tmp_path / "new")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        check_folder(tmp_path)
    for foreign in ('{"mine": 1}', "[]", "3", "no JSON"):  # of the same name
        (tmp_path / JSON_NAME).write_text(foreign)
        with pytest.raises(OutputError, match="holds other files"):
            check_folder(tmp_path)


def test_the_page_says_what_it_measured_and_what_is_missing() -> None:
    text = page(made_up(finished=None), "bench.png")
    for words in (
        "A processor (AVX2), 2 threads on 2 CPU cores",
        "`dydit bench DiT-XL/2`",
        "Not complete",
        "bench.png",
        "dydit 0 (0123456789)",
        "load average 0.25 before",
    ):
        assert words in text
    assert "Not complete" not in page(made_up())
    assert page(made_up(made_up_case(rows=4))).count("both halves of guidance") == 1


@pytest.mark.parametrize("sweep", ["batch", "tokens", "depth"])
def test_a_sweep_is_drawn_along_what_grows(sweep: str) -> None:
    cases = [made_up_case(**{sweep: value}, memory=None, whole_run=None) for value in (4, 8, 16)]
    swept = made_up(*cases, sweep=sweep)
    assert draw(swept) != draw(made_up(*cases))
    header = calls_table(swept).header
    assert sweep in header


def test_an_empty_benchmark_can_be_written(tmp_path: Path) -> None:
    empty = Benchmark(**{**made_up().__dict__, "cases": (), "finished": None})
    save_benchmark(empty, tmp_path)
    assert load_benchmark(tmp_path / JSON_NAME).cases == ()


def test_one_round_per_timestep_has_no_quartiles() -> None:
    (case,) = made_up().cases
    (row,) = calls_table(made_up()).rows
    assert not case.repeated and not any("–" in cell for cell in row)
    twice = case.model_copy(update={"rounds": case.rounds * 2})
    (row,) = calls_table(made_up(twice)).rows
    assert twice.repeated and "0.800 (0.800–0.800)" in row


def test_titles_tell_benchmarks_of_one_subject_apart() -> None:
    settings: list[dict[str, Any]] = [
        {}, {"rounds": 1}, {"compile": True}, {"depth": 4}, {"sweep": "depth"}, {"sweep": "tokens"},
        {"sweep": "tokens", "depth": 4}, {"sweep": "batch", "compile": True},
    ]  # fmt: skip
    cases = made_up_case(), made_up_case(dtype="bf16"), made_up_case(batch=8, rows=8)
    titles = [title(made_up(case, **chosen)) for chosen in settings for case in cases]
    assert len(set(titles)) == len(titles) - 1  # of batches that are swept, all are in one
    assert "fp32, depth swept, batch 2, 20 rounds" in titles[3 * 4]


def test_lines_of_several_batches_have_markers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "png_bytes", lambda figure: drawn.append(figure) or b"")
    cases = [made_up_case(batch=batch, rows=batch, depth=depth) for batch in (2, 8) for depth in (7, 28)]
    figures.draw(made_up(*cases, sweep="depth"))
    lines = [line for line in drawn[0].axes[1].get_lines() if len(line.get_xdata()) == 2]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 4
