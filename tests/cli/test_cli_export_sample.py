"""``dydit export`` and ``dydit sample``: what comes out, and what is refused before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from core_builders import relative_error
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dydit.cli.sample import exported_sampler, parse_labels
from dydit.cli.sampler_options import SamplerChoice, sampler_settings
from dydit.errors import ConfigError, DataError, ScheduleError
from dydit.precision import DTYPES
from dydit.runtime.engine import SubnetEngine


def test_export_says_what_it_wrote(command: Any, models: Any, tmp_path: Path) -> None:
    outcome = command("export", models.dynamic, "--out", tmp_path / "e", "--sampler", "ddpm", "--steps", "5")
    assert outcome.status == 0, outcome.err
    assert "ddpm, 5 timesteps" in outcome.out
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "manifest.json",
        "schedule.safetensors",
    ]
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert (manifest["sampler"]["name"], len(manifest["timesteps"])) == ("ddpm", 5)


def test_an_export_may_be_replaced_but_no_other_folder(command: Any, models: Any, tmp_path: Path) -> None:
    export = ("export", models.dynamic, "--steps", "3", "--out")
    assert command(*export, tmp_path / "e").status == 0
    assert command(*export, tmp_path / "e").status == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert "holds other files" in command(*export, tmp_path / "thesis").error
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    # Latent caches and checkpoints have a manifest too.
    (tmp_path / "cache").mkdir()
    for name in ("manifest.json", "shard-00000.safetensors"):
        (tmp_path / "cache" / name).write_bytes((tmp_path / "e" / "manifest.json").read_bytes())
    told = command(*export, tmp_path / "cache").error
    assert "holds other files, such as shard-00000.safetensors; expected a new folder or an export" in told
    (tmp_path / "cache" / "shard-00000.safetensors").unlink()
    assert "holds other files, such as manifest.json" in command(*export, tmp_path / "cache").error
    # What was put into an export is not the export's to delete.
    (tmp_path / "e" / "samples").mkdir()
    assert "holds other files, such as samples" in command(*export, tmp_path / "e").error
    assert (tmp_path / "e" / "samples").is_dir()


def test_an_export_never_replaces_the_model_that_it_is_made_from(
    command: Any, models: Any, tmp_path: Path
) -> None:
    export, place = ("export", models.dynamic, "--steps", "3"), tmp_path / "e"
    assert command(*export, "--with-weights", "--out", place).status == 0
    weights = sorted(path.name for path in place.iterdir())
    for out in (place, tmp_path / "link"):
        if out != place:
            out.symlink_to(place)
        refused = command("export", place, "--steps", "2", "--out", out)
        assert refused.status == 2 and "holds the model, which the export would replace" in refused.error
    assert sorted(path.name for path in place.iterdir()) == weights
    assert command("export", place, "--steps", "2", "--with-weights", "--out", place).status == 0
    assert len(json.loads((place / "manifest.json").read_text())["timesteps"]) == 2


def test_an_exports_folder_brings_its_sampler(command: Any, models: Any, tmp_path: Path) -> None:
    words = ("--sampler", "ddpm", "--steps", "5", "--guidance-scale", "2")
    assert command("export", models.dynamic, *words, "--with-weights", "--out", tmp_path / "a").status == 0
    assert command("export", tmp_path / "a", "--steps", "4", "--out", tmp_path / "b").status == 0
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert second["sampler"] == {**first["sampler"], "steps": 4}
    (tmp_path / "a" / "manifest.json").write_text("{}")
    assert "manifest.json" in command("export", tmp_path / "a", "--out", tmp_path / "c").error


def test_engine_draws_what_the_masked_model_draws(
    command: Any, models: Any, exported: Path, tmp_path: Path
) -> None:
    words = ("--labels", "0,3", "--num", "5", "--steps", "4", "--seed", "7", "--out")
    assert command("sample", exported, "--schedule", exported, *words, tmp_path / "engine").status == 0
    assert command("sample", models.dynamic, *words, tmp_path / "masked").status == 0
    engine, masked = (load_file(tmp_path / name / "samples.safetensors") for name in ("engine", "masked"))
    assert engine["labels"].tolist() == [0, 3, 0, 3, 0]
    assert engine["images"].shape == (5, 1, 8, 8)
    torch.testing.assert_close(engine["images"], masked["images"], rtol=1e-4, atol=1e-4)


def test_a_small_memory_budget_changes_no_image(
    command: Any, models: Any, exported: Path, tmp_path: Path
) -> None:
    words = ("sample", exported, "--schedule", exported, "--labels", "0,3", "--steps", "4")
    assert command(*words, "--out", tmp_path / "plenty").status == 0
    assert command(*words, "--memory-budget", "100KB", "--out", tmp_path / "little").status == 0
    plenty, little = (load_file(tmp_path / name / "samples.safetensors") for name in ("plenty", "little"))
    assert torch.equal(plenty["images"], little["images"])
    refused = command(*words, "--memory-budget", "10", "--out", tmp_path / "none")
    assert refused.status == 2 and "memory budget of 10 bytes" in refused.error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "option", [("--memory-budget", "1GB"), ("--compile",), ("--mode", "exact"), ("--dtype", "bf16")]
)
def test_options_of_the_engine_need_a_schedule(
    command: Any, models: Any, tmp_path: Path, option: tuple[str, ...]
) -> None:
    outcome = command("sample", models.dynamic, "--labels", "0", "--out", tmp_path / "out", *option)
    assert outcome.status == 2 and f"{option[0]} without --schedule" in outcome.error


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_samples_in_another_precision(
    command: Any,
    models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    sampler: str,
) -> None:
    seen, call, exported = set(), SubnetEngine.forward, tmp_path / "exported"
    chosen = ("--sampler", sampler, "--steps", "4", "--with-weights")
    assert command("export", models.dynamic, "--out", exported, *chosen).status == 0
    words = ("sample", exported, "--schedule", exported, "--labels", "0,3")
    assert command(*words, "--out", tmp_path / "own").status == 0

    def watched(self: SubnetEngine, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.add(x.dtype)
        return call(self, x, *rest)

    monkeypatch.setattr(SubnetEngine, "forward", watched)
    outcome = command(*words, "--dtype", dtype, "--out", tmp_path / "other")
    assert outcome.status == 0, outcome.err
    assert seen == {DTYPES[dtype]}
    own, other = (load_file(tmp_path / name / "samples.safetensors")["images"] for name in ("own", "other"))
    assert own.shape == other.shape and other.dtype == torch.float32 and other.isfinite().all()
    assert torch.equal(own, other) == (dtype == "fp32")
    assert relative_error(other, own) < 5e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiler is that of the CPU")
def test_compiling_without_a_compiler_is_refused_before_any_work(
    command: Any, models: Any, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = ("--schedule", exported, "--labels", "0", "--compile", "--out", tmp_path / "s")
    told = command("sample", exported, *words).error
    assert "--compile without a C++ compiler" in told and "leave --compile out" in told
    assert not (tmp_path / "s").exists()


def test_equal_commands_write_equal_files(command: Any, models: Any, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        words = ("--labels", "1", "--steps", "3", "--out", tmp_path / name)
        assert command("sample", models.static, *words).status == 0
        files.append(
            [(tmp_path / name / file).read_bytes() for file in ("samples.png", "samples.safetensors")]
        )
    assert files[0] == files[1]


def test_guidance_and_facts(command: Any, models: Any, exported: Path, tmp_path: Path) -> None:
    words = ("--labels", "1,2", "--guidance-scale", "2", "--guided-channels", "all", "--out", tmp_path)
    assert command("sample", models.dynamic, "--schedule", exported, *words).status == 0
    with safe_open(tmp_path / "samples.safetensors", "pt") as file:
        sampler = json.loads(file.metadata()["dydit"])["sampler"]
    # The steps are those of the export.
    assert (sampler["steps"], sampler["guidance_scale"], sampler["guided_channels"]) == (4, 2.0, None)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > 2 * 64


@pytest.mark.parametrize("labels", ["10", "-1", "0,10"])
def test_labels_out_of_range(command: Any, models: Any, tmp_path: Path, labels: str) -> None:
    told = command("sample", models.static, f"--labels={labels}", "--out", tmp_path / "s").error
    assert "a class of the model, 0 to 9" in told
    assert not (tmp_path / "s").exists()


def test_a_timestep_that_the_schedule_lacks(
    command: Any, models: Any, exported: Path, tmp_path: Path
) -> None:
    words = ("--labels", "0", "--steps", "7", "--out", tmp_path / "s")
    told = command("sample", models.dynamic, "--schedule", exported, *words).error
    assert "export again" in told
    assert not (tmp_path / "s").exists()


def test_a_schedule_for_other_weights(command: Any, models: Any, exported: Path, tmp_path: Path) -> None:
    words = ("--labels", "0", "--out", tmp_path / "s")
    assert "sha256" in command("sample", models.other, "--schedule", exported, *words).error
    assert "DyDiT" in command("sample", models.static, "--schedule", exported, *words).error
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("keep", [0, 100])
def test_truncated_weights(command: Any, models: Any, tmp_path: Path, keep: int) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models.dynamic, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:keep])
    assert str(broken) in command("export", broken, "--out", tmp_path / "e").error
    assert str(broken) in command("sample", broken, "--labels", "0", "--out", tmp_path / "e").error
    assert not (tmp_path / "e").exists()


def test_truncated_schedule(command: Any, models: Any, exported: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    masks = broken / "schedule.safetensors"
    masks.write_bytes(masks.read_bytes()[:-8])
    words = ("--labels", "0", "--out", tmp_path / "s")
    assert str(masks) in command("sample", models.dynamic, "--schedule", broken, *words).error


def test_missing_model(command: Any, models: Any, tmp_path: Path) -> None:
    for verb in (("export",), ("sample", "--labels", "0")):
        assert "nowhere" in command(*verb, "nowhere", "--out", tmp_path / "e").error
    assert "expected a DyDiT" in command("export", models.static, "--out", tmp_path / "e").error
    assert not (tmp_path / "e").exists()


def test_an_unfinished_run(command: Any, finetune_yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finetune_yaml, run / "config.yaml")
    assert "is not finished" in command("export", run, "--out", tmp_path / "e").error


def test_unwritable_output(command: Any, models: Any, blocked: Path) -> None:
    assert str(blocked) in command("export", models.dynamic, "--out", blocked).error
    assert (
        str(blocked)
        in command("sample", models.static, "--labels", "0", "--steps", "2", "--out", blocked).error
    )


def test_nothing_is_left_of_a_failed_export(
    command: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dydit.dynamic.dydit import DyDiT

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DyDiT, "save_pretrained", fail)
    words = ("--steps", "2", "--with-weights", "--out", tmp_path / "e")
    assert "No space left" in command("export", models.dynamic, *words).error
    assert list(tmp_path.iterdir()) == []


def test_samples_that_are_not_finite_are_no_success(command: Any, models: Any, tmp_path: Path) -> None:
    words = ("--labels", "0", "--guidance-scale", "1e38", "--guided-channels", "all", "--steps", "3")
    outcome = command("sample", models.static, *words, "--out", tmp_path)
    assert outcome.status == 2
    assert "1 of 1 samples are not finite" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("known", "given"), [("ddim", "flow_euler"), ("ddpm", "flow_heun"), ("flow_euler", "dpm++")]
)
def test_a_sampler_of_the_other_kind_is_refused(known: str, given: str) -> None:
    fitting = "flow_euler or flow_heun" if known.startswith("flow") else "ddim, ddpm or dpm"
    with pytest.raises(
        ConfigError, match=rf"sampler {re.escape(given)} for a model .* by {known}; expected {fitting}"
    ):
        sampler_settings({"name": known, "steps": 5}, SamplerChoice(given))
    assert sampler_settings({}, SamplerChoice(given)).name == given  # nothing is known


def test_an_exports_sampler_keeps_its_kind(command: Any, exported: Path, models: Any, tmp_path: Path) -> None:
    words = ("sample", models.dynamic, "--schedule", exported, "--labels", "0", "--sampler", "flow_euler")
    assert "expected ddim, ddpm or dpm++" in command(*words, "--out", tmp_path / "s").error
    assert not (tmp_path / "s").exists()


def test_a_seed_beyond_what_torch_takes_is_refused(command: Any, models: Any, tmp_path: Path) -> None:
    large = str(1 << 64)
    words = "sample", models.dynamic, "--labels", "0", "--seed", large, "--out", tmp_path / "s"
    assert "'--seed'" in command(*words).error
    words = "export", models.dynamic, "--capacity", "--calibration-seed", large, "--out", tmp_path / "e"
    assert "'--calibration-seed'" in command(*words).error


def test_given_options_go_over_the_defaults() -> None:
    defaults = {"name": "ddpm", "steps": 9, "guidance_scale": 3.0, "guided_channels": 2}
    assert sampler_settings(defaults).model_dump() | defaults == sampler_settings(defaults).model_dump()
    chosen = sampler_settings(defaults, SamplerChoice.DPM, guided_channels="1")
    assert (chosen.name, chosen.steps, chosen.guided_channels) == ("dpm++", 9, 1)
    with pytest.raises(ConfigError, match="--guided-channels"):
        sampler_settings({}, guided_channels="some")


def test_labels_and_manifest() -> None:
    assert parse_labels("0, 3,7") == [0, 3, 7]
    for text in ("", "1,,2", "cat"):
        with pytest.raises(DataError, match="--labels"):
            parse_labels(text)
    with pytest.raises(ScheduleError, match="does not name its sampler"):
        exported_sampler({}, Path("e"))


def test_a_file_in_the_place_of_an_export_is_told_before_the_work(
    command: Any, models: Any, tmp_path: Path
) -> None:
    (tmp_path / "e").write_text("mine")
    told = command("export", models.dynamic, "--out", tmp_path / "e")
    assert "e is a file; expected a folder" in told.error and "%" not in told.err
    assert (tmp_path / "e").read_text() == "mine"
