"""``dydit pretrain`` and ``finetune``: the right task, mistakes in one line, a folder that others can use."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


def test_finetune_resume_export_and_sample(command: Any, finetune_yaml: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "samples"
    trained = command("finetune", finetune_yaml)
    assert trained.status == 0, trained.err
    assert f"{run}: 2 steps; model in {run / 'model'}" in trained.out
    assert "holds a run already" in command("finetune", finetune_yaml).error
    resumed = command("finetune", finetune_yaml, "train.steps=3", "--resume", "auto")
    assert resumed.status == 0, resumed.err
    assert "resumed at step 2" in resumed.err
    assert command("export", run, "--out", tmp_path / "export").status == 0
    drawn = command("sample", run, "--schedule", tmp_path / "export", "--labels", "1,2", "--out", out)
    assert drawn.status == 0, drawn.err
    assert "ddim with 3 steps" in drawn.out  # the run's sampler went into the export
    assert (out / "samples.png").is_file()


def test_dry_run_writes_nothing(command: Any, finetune_yaml: Path, tmp_path: Path) -> None:
    outcome = command("finetune", finetune_yaml, "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "GMACs" in outcome.out
    assert not (tmp_path / "run").exists()


def test_pretrain(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text(
        f"""\
task: pretrain
output_dir: {tmp_path / "run"}
model:
  {{sample_size: 8, patch_size: 2, in_channels: 1, hidden_size: 16, depth: 1, num_heads: 2, num_classes: 10}}
data: {{batch_size: 4}}
train: {{steps: 1}}
"""
    )
    assert command("pretrain", path).status == 0
    assert command("macs", tmp_path / "run").status == 0


def test_a_run_that_was_asked_to_stop_ends_well(
    command: Any, finetune_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dydit.training

    stopped = dydit.training.TrainResult(1, None, stopped=True)
    monkeypatch.setattr(dydit.training, "run_training", lambda *_: stopped)
    assert command("finetune", finetune_yaml).status == 0


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.lrr=1", "unknown key train.lrr; did you mean train.lr?"),
        ("compute.target=0", "compute.target is 0"),
        ("compute.target=1.5", "compute.target is 1.5"),
        ("backbone=nowhere/at/all", "nowhere/at/all"),
        ("task=pretrain", "pretrain"),
    ],
)
def test_wrong_settings(command: Any, finetune_yaml: Path, tmp_path: Path, override: str, part: str) -> None:
    assert part in command("finetune", finetune_yaml, override).error
    assert not (tmp_path / "run").exists()


def test_the_other_verb_is_named(command: Any, finetune_yaml: Path) -> None:
    assert "run `dydit finetune" in command("pretrain", finetune_yaml).error


def test_truncated_backbone(command: Any, models: Any, finetune_yaml: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models.static, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(broken) in command("finetune", finetune_yaml, f"backbone={broken}").error
    assert not (tmp_path / "run").exists()


def test_unwritable_output(command: Any, finetune_yaml: Path, blocked: Path) -> None:
    assert str(blocked) in command("finetune", finetune_yaml, f"output_dir={blocked}").error


def test_the_model_of_a_run_brings_the_runs_sampler(
    command: Any, finetune_yaml: Path, tmp_path: Path
) -> None:
    """A run's last line names this path; a model of flow would else be sampled as one of noise."""
    from dydit.cli.models import sampler_defaults, trained_target

    assert command("finetune", finetune_yaml).status == 0
    model = tmp_path / "run" / "model"
    weights = model / "diffusion_pytorch_model.safetensors"
    for path in (tmp_path / "run", model, weights):
        assert sampler_defaults(str(path))["steps"] == 3
        assert trained_target(str(path)) == trained_target(str(tmp_path / "run")) is not None
    # Beside other people's config.yaml it is a folder like any other.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("hydra: {}")
    shutil.copytree(model, tmp_path / "other" / "model")
    assert sampler_defaults(str(tmp_path / "other" / "model")) == {}
