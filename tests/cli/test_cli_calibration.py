"""``dydit export --calibrate --capacity --order``: what is measured, written, said, and sampled from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_builders import routed_dydit
from core_builders import small_inputs
from safetensors.torch import load_file, save_file

from dydit.cli.app import main
from dydit.config import SamplerConfig
from dydit.diffusion import make_sampler
from dydit.dynamic.loading import load_dydit
from dydit.export.recording import Start, record
from dydit.export.schedule import SubnetSchedule
from dydit.export.thresholds import Thresholds

SETTINGS = ("--sampler", "ddim", "--steps", "4", "--guided-channels", "1")
TARGET = 0.7


@pytest.fixture(scope="module")
def calibrated(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the dynamic model for ``TARGET``, with its weights."""
    out = tmp_path_factory.mktemp("calibrated") / "e"
    words = ("--calibrate", "--target", TARGET, "--capacity", "--with-weights", "--out", out)
    assert main([str(word) for word in ("export", models.dynamic, *SETTINGS, *words)]) == 0
    return out


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def measured_ratio(folder: Path, schedule: SubnetSchedule) -> float:
    model = load_dydit(folder)
    sampler = make_sampler(SamplerConfig(**schedule.sampler), model.shape.learn_sigma)
    return record(model, sampler, Start.draw(model, 8, seed=0)).ratio(Thresholds.of(model))


def test_the_exported_model_costs_the_target(calibrated: Path) -> None:
    schedule, manifest = SubnetSchedule.load(calibrated), manifest_of(calibrated)
    found = manifest["calibration"]
    assert (found["target"], found["samples"], found["seed"]) == (TARGET, 8, 0)
    assert abs(found["ratio"]["after"] / TARGET - 1) <= 0.01 < abs(found["ratio"]["before"] / TARGET - 1)
    assert measured_ratio(calibrated, schedule) == pytest.approx(found["ratio"]["after"], rel=1e-9)
    after = found["thresholds"]["after"]
    assert manifest["thresholds"] == after != found["thresholds"]["before"] == {"width": 0.5, "tokens": 0.5}
    config = json.loads((calibrated / "config.json").read_text())["dydit"]
    assert (config["threshold"], config["token_threshold"]) == (after["width"], after["tokens"])


def test_capacities_are_part_of_the_export(calibrated: Path) -> None:
    schedule, found = SubnetSchedule.load(calibrated), manifest_of(calibrated)["calibration"]["capacity"]
    assert schedule.capacities is not None and schedule.capacities.shape == (4, 2)
    assert found["multiple"] == 1 and found["ratio"] == pytest.approx(TARGET, rel=0.03)
    assert found["relative_l2_difference"]["calls"] > 0


def test_the_original_folder_samples_at_the_schedules_thresholds(
    command: Any, models: Any, calibrated: Path, tmp_path: Path
) -> None:
    """Its own configuration still says 0.5: masks and token threshold come from the schedule."""
    images = {}
    for name, words in {
        "engine": (models.dynamic, "--schedule", calibrated),
        "masked": (calibrated, *SETTINGS),
        "before": (models.dynamic, *SETTINGS),
    }.items():
        folder = tmp_path / name
        assert command("sample", *words, "--labels", "0,3", "--num", "4", "--out", folder).status == 0
        images[name] = load_file(folder / "samples.safetensors")["images"]
    torch.testing.assert_close(images["engine"], images["masked"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(images["engine"], images["before"], rtol=1e-3, atol=1e-3)


def test_sampling_with_the_exports_capacities(
    command: Any, models: Any, exported: Path, calibrated: Path, tmp_path: Path
) -> None:
    words = ("sample", models.dynamic, "--labels", "0,3", "--num", "4", "--schedule")
    images = {}
    for mode in ("exact", "capacity"):
        assert command(*words, calibrated, "--mode", mode, "--out", tmp_path / mode).status == 0
        images[mode] = load_file(tmp_path / mode / "samples.safetensors")["images"]
    assert images["exact"].shape == images["capacity"].shape
    assert not torch.equal(images["exact"], images["capacity"])
    # An export without capacities has no such mode, and a model without a schedule has none at all.
    told = command(*words, exported, "--mode", "capacity", "--out", tmp_path / "s").error
    assert "a schedule without capacities" in told
    assert (
        "--mode without --schedule" in command(*words[:-1], "--mode", "exact", "--out", tmp_path / "s").error
    )
    assert not (tmp_path / "s").exists()


def test_it_says_by_how_much_it_moved(command: Any, models: Any, tmp_path: Path) -> None:
    words = ("--calibrate", "--target", "0.6", "--calibration-samples", "4", "--calibration-seed", "3")
    outcome = command("export", models.dynamic, *SETTINGS, *words, "--out", tmp_path / "e")
    assert outcome.status == 0, outcome.err
    found = manifest_of(tmp_path / "e")["calibration"]
    ratio, thresholds = found["ratio"], found["thresholds"]
    assert f"compute ratio {ratio['before']:.4f} -> {ratio['after']:.4f} (target 0.6)" in outcome.out
    assert f"width 0.5 -> {thresholds['after']['width']:.4g}" in outcome.out
    assert f"tokens 0.5 -> {thresholds['after']['tokens']:.4g}" in outcome.out
    assert f"{found['passes']} passes over 4 samples" in outcome.out and "capacity" not in outcome.out
    assert (found["samples"], found["seed"]) == (4, 3)
    assert not (tmp_path / "e" / "config.json").exists()


def test_capacity_alone_leaves_the_thresholds(command: Any, models: Any, tmp_path: Path) -> None:
    words = ("--capacity", "--capacity-multiple", "4", "--out", tmp_path / "e")
    outcome = command("export", models.dynamic, *SETTINGS, *words)
    assert outcome.status == 0, outcome.err
    manifest = manifest_of(tmp_path / "e")
    assert manifest["thresholds"] == {"width": 0.5, "tokens": 0.5}
    found = manifest["calibration"]
    assert found["target"] is None and found["passes"] == 1 and found["capacity"]["multiple"] == 4
    capacities = SubnetSchedule.load(tmp_path / "e").capacities
    assert capacities is not None and not np.any(capacities % 4)
    assert "calibrated" not in outcome.out
    difference = found["capacity"]["relative_l2_difference"]
    assert f"difference to it {difference['calls']:.3g} per call" in outcome.out


def test_an_ordered_export_draws_the_same(
    command: Any, models: Any, calibrated: Path, tmp_path: Path
) -> None:
    outcome = command("export", calibrated, *SETTINGS, "--order", "--out", tmp_path / "ordered")
    assert outcome.status == 0, outcome.err
    before, after = (SubnetSchedule.load(folder) for folder in (calibrated, tmp_path / "ordered"))
    told = f"ordered: {before.view_share:.1%} -> {after.view_share:.1%} of slices are views of the weights"
    assert told in outcome.out
    assert before.weights != after.weights
    images = []
    for folder in (calibrated, tmp_path / "ordered"):
        words = ("--labels", "1,2", "--out", tmp_path / f"samples of {folder.name}")
        assert command("sample", folder, "--schedule", folder, *words).status == 0
        images.append(load_file(words[-1] / "samples.safetensors")["images"])
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)
    # The weights that it was not made from are refused.
    words = ("--labels", "1", "--out", tmp_path / "s")
    assert "sha256" in command("sample", models.dynamic, "--schedule", tmp_path / "ordered", *words).error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--target", "0.5"), "--target without --calibrate; add --calibrate"),
        (("--capacity-multiple", "4"), "--capacity-multiple without --capacity; add --capacity"),
        (
            ("--calibration-samples", "4"),
            "--calibration-samples without --calibrate or --capacity; add --calibrate or --capacity, or",
        ),
        (("--calibration-seed", "0"), "--calibration-seed without --calibrate or --capacity"),
        (("--calibrate",), "--calibrate for a model that is no run's folder; expected a compute ratio"),
        (
            ("--calibrate", "--target", "0.01"),
            "no thresholds found for a compute ratio of 0.01: the nearest is",
        ),
        (("--calibrate", "--target", "-1"), "target ratio -1; expected above 0"),
        (("--capacity", "--capacity-multiple", "99"), "multiples of 99; expected 1 to the model's 16 tokens"),
    ],
)
def test_what_cannot_be_done_writes_nothing(
    command: Any, models: Any, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    assert told in command("export", models.dynamic, *SETTINGS, *words, "--out", tmp_path / "e").error
    assert not (tmp_path / "e").exists()


def test_a_runs_own_target(command: Any, finetune_yaml: Path, tmp_path: Path) -> None:
    """Converted and hardly trained, it costs all there is; its configuration says what it was to cost."""
    assert command("finetune", finetune_yaml).status == 0
    outcome = command("export", tmp_path / "run", "--calibrate", "--out", tmp_path / "e")
    assert outcome.status == 0, outcome.err
    found = manifest_of(tmp_path / "e")["calibration"]
    assert found["target"] == 0.9 and found["ratio"]["before"] > 1 > 0.91 > found["ratio"]["after"]
    assert "(target 0.9), threshold of width 0.5 -> 1 - " in outcome.out


def test_texts_of_a_file(command: Any, tmp_path: Path) -> None:
    model = routed_dydit(conditioning="adaln_single")
    model.save_pretrained(tmp_path / "model")
    texts, file = small_inputs(model.shape, batch=2)[1], tmp_path / "texts.safetensors"
    words = ("export", tmp_path / "model", *SETTINGS, "--calibrate", "--target", 0.6, "--capacity")
    out = "--out", tmp_path / "e"
    for content, told in (
        ({}, "holds nothing; expected one tensor (texts, tokens, width) of numbers; save what"),
        ({"a": texts, "b": texts.clone()}, f"holds a {tuple(texts.shape)} torch.float32, b "),
        ({"a": texts.long()}, "torch.int64; expected one tensor"),
        ({"a": texts[0]}, "expected one tensor"),
        (None, "cannot be read"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            save_file(content, file)
        assert told in command(*words, "--texts", file, *out).error
    assert "without any; expected texts" in command(*words, *out).error
    assert not (tmp_path / "e").exists()
    save_file({"encoded": texts}, file)
    outcome = command(*words, "--texts", file, *out)
    assert outcome.status == 0, outcome.err
    found = manifest_of(tmp_path / "e")["calibration"]
    assert found["ratio"]["after"] == pytest.approx(0.6, rel=0.01)
    assert SubnetSchedule.load(tmp_path / "e").capacities is not None
    told = command(*words[:-4], "--texts", file, *out).error
    assert "--texts without --calibrate or --capacity" in told
