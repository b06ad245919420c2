"""The main job from end to end on the shipped backbone, with few steps and few samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.browser import check_page, open_browser

from dydit.cli.app import main
from dydit.config import find_path
from dydit.errors import OutputError
from dydit.export.schedule import SubnetSchedule
from dydit.quickstart import measure, run, run_quickstart
from dydit.quickstart.run import recipe
from dydit.report.storage import load_summary
from dydit.training import TrainResult

STEPS = 4
SAMPLING = "name: ddim\n  steps: 20"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same command line, with few images and sampling steps."""
    config = tmp_path_factory.mktemp("recipe") / "digits.yaml"
    text = Path(find_path(run.CONFIG)).read_text()
    assert SAMPLING in text
    config.write_text(text.replace(SAMPLING, "name: ddim\n  steps: 5"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CONFIG", str(config))
        patch.setattr(measure, "BATCH", 10)
        patch.setattr(measure, "QUALITY_SAMPLES", 40)
        patch.setattr(measure, "TIMING_ROUNDS", 2)
        runs = [tmp_path_factory.mktemp("quickstart") / name for name in ("first", "again")]
        for folder in runs:
            options = [f"--steps={STEPS}", f"--out={folder}", "--ratio=0.6", "--seed=3", "--control"]
            assert main(["quickstart", *options]) == 0
        return runs


@pytest.fixture(scope="module")
def folder(folders: list[Path]) -> Path:
    return folders[0]


def test_the_summary_holds_what_was_asked_for(folder: Path) -> None:
    summary = load_summary(folder)
    assert summary.conditions.target_ratio == 0.6
    assert summary.conditions.training_steps == STEPS
    assert summary.conditions.seed == 3
    assert summary.conditions.command == f"dydit quickstart --steps={STEPS} --ratio=0.6 --seed=3 --control"
    assert summary.compute.unsupported == {}
    assert [row.role for row in summary.quality] == ["real", "backbone", "dydit", "control"]
    assert all(metric.value is not None for row in summary.quality for metric in row.metrics)
    assert all("FID" not in metric.name for row in summary.quality for metric in row.metrics)


def test_the_two_promises_hold_on_the_trained_model(folder: Path) -> None:
    checks = {check.name: check for check in load_summary(folder).checks}
    assert len(checks) == 3
    assert all(check.passed for check in checks.values()), checks
    assert checks["counted and analytic MACs of the engine"].max_relative_difference == 0


def test_the_shipped_backbone_draws_recognisable_digits(folder: Path) -> None:
    rows = {row.role: row for row in load_summary(folder).quality}
    accuracy = next(m for m in rows["backbone"].metrics if "accuracy" in m.name)
    assert accuracy.value is not None and accuracy.value > 95


def test_the_same_seed_gives_the_same_numbers(folders: list[Path]) -> None:
    first, again = (load_summary(folder) for folder in folders)
    assert first.compute == again.compute
    assert first.quality == again.quality
    assert [point.loss for point in first.training] == [point.loss for point in again.training]
    for name, array in first.arrays.present().items():
        np.testing.assert_array_equal(array, again.arrays.present()[name], err_msg=name)


def test_the_export_can_be_loaded_and_holds_the_sampler(folder: Path) -> None:
    schedule = SubnetSchedule.load(str(folder / "export"))
    assert schedule.sampler["name"] == "ddim"
    assert len(schedule.timesteps) == schedule.sampler["steps"]


def test_figures_and_json_are_there(folder: Path) -> None:
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert {"samples.png", "width.png", "token_pictures.png", "training.png"} <= figures
    assert json.loads((folder / "summary.json").read_text())["derived"]["ideal_speedup"] >= 1


def test_the_report_opens_in_a_browser_with_every_figure(folder: Path, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as driver:
        check_page(driver, folder / "report.html", charts=5, images=2)


@pytest.mark.parametrize("ratio", ["0", "1.5", "-0.1", "nan"])
def test_a_ratio_outside_its_range_is_refused(
    ratio: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quickstart", "--ratio", ratio, "--out", str(out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()


def test_a_ratio_below_the_fixed_parts_is_refused_with_the_least_possible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quickstart", "--ratio", "0.01", "--out", str(tmp_path / "out")]) == 2
    assert "the least this model can spend" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        run_quickstart(out=str(tmp_path / "file" / "out"))


def test_settings_of_the_command_line_reach_the_recipe(tmp_path: Path) -> None:
    cfg = recipe(steps=7, ratio=0.7, seed=5, folder=tmp_path)
    assert (cfg.train.steps, cfg.compute.target, cfg.seed) == (7, 0.7, 5)
    assert cfg.output_dir == str(tmp_path / "run")


def test_a_second_run_in_one_folder_is_refused_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = r"run holds a run already; choose another --out, or delete what is there"
    assert main(["quickstart", "--out", str(folder)]) == 2
    assert told in capsys.readouterr().err
    (tmp_path / "run-control").mkdir()
    (tmp_path / "run-control" / "left").touch()
    assert main(["quickstart", "--control", "--out", str(tmp_path)]) == 2
    assert told.replace("run ", "run-control ", 1) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run-control"]


@pytest.mark.parametrize("control", [False, True])
def test_half_a_training_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: bool) -> None:
    trained = []

    def stop(model: Any, *_: Any, **__: Any) -> TrainResult:
        trained.append(model)
        return TrainResult(1, model, stopped=len(trained) > int(control))

    monkeypatch.setattr(run, "train", stop)
    monkeypatch.setattr(measure, "QUALITY_SAMPLES", 10)
    options = ["--out", str(tmp_path / "out"), *(["--control"] if control else [])]
    assert main(["quickstart", *options]) == 130
    assert len(trained) == 1 + control
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_folder_of_any_name(tmp_path: Path) -> None:
    assert recipe(None, None, None, tmp_path / "my run #2").output_dir == str(tmp_path / "my run #2" / "run")
