"""``dydit export --aot``."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from core_builders import randomize, relative_error, small_dydit, small_inputs
from safetensors import SafetensorError

from dydit.cli.app import main
from dydit.deployment.loader import Deployment
from dydit.dynamic.dydit import DyDiT
from dydit.dynamic.loading import load_dydit
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine

EXPORT = ("--sampler", "ddim", "--steps", "4", "--guidance-scale", "1")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small_dydit(0, mixed=False)
    randomize(model.dynamic_blocks, 3)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(saved: Path, out: Path, *options: str) -> int:
    return main(["export", str(saved), "--out", str(out), *EXPORT, *options])


@pytest.mark.parametrize(
    "options",
    [(), ("--capacity",), ("--aot-dtype", "bf16"), ("--order",), ("--order", "--aot-dtype", "bf16")],
)
def test_the_folder_runs_like_the_engine(saved: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    assert run(saved, out, "--aot", "--no-aot-compile", *options) == 0
    dtype = torch.bfloat16 if "bf16" in options else torch.float32
    schedule = SubnetSchedule.load(out)
    model: DyDiT = load_dydit(out if "--order" in options else saved)
    mode = "exact" if schedule.capacities is None else "capacity"
    engine = SubnetEngine(model, schedule, dtype=dtype, mode=mode)  # type: ignore[arg-type]
    x, y = small_inputs(model.shape)
    for t in schedule.timesteps:
        found, expected = Deployment(out, device="cpu")(x.to(dtype), t, y), engine(x.to(dtype), t, y)
        assert found.dtype == dtype
        assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ((), "weights.safetensors"),
        (("--order",), "diffusion_pytorch_model.safetensors"),
        (("--with-weights",), "diffusion_pytorch_model.safetensors"),
        (("--with-weights", "--aot-dtype", "bf16"), "diffusion_pytorch_model.safetensors"),
    ],
)
def test_weights_are_in_the_folder_once(
    saved: Path, tmp_path: Path, options: tuple[str, ...], file: str
) -> None:
    out = tmp_path / "out"
    assert run(saved, out, "--aot", "--no-aot-compile", *options) == 0
    assert json.loads((out / "deployment.json").read_text())["weights"].keys() == {file}
    assert {path.name for path in out.glob("*.safetensors")} == {"schedule.safetensors", file}


def test_weights_in_shards_are_shared_too(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As diffusers saves a model of over 10 GB."""
    in_shards = partialmethod(DyDiT.save_pretrained, max_shard_size="100KB")
    monkeypatch.setattr(DyDiT, "save_pretrained", in_shards)
    out = tmp_path / "out"
    assert run(saved, out, "--aot", "--no-aot-compile", "--with-weights") == 0
    files = {path.name for path in out.glob("*.safetensors")} - {"schedule.safetensors"}
    assert json.loads((out / "deployment.json").read_text())["weights"].keys() == files
    assert len(files) > 1 and "weights.safetensors" not in files
    model: DyDiT = load_dydit(out)
    schedule, (x, y) = SubnetSchedule.load(out), small_inputs(model.shape)
    t = schedule.timesteps[0]
    assert relative_error(Deployment(out)(x, t, y), SubnetEngine(model, schedule)(x, t, y)) < 1e-5


@pytest.mark.parametrize("option", [("--aot-dtype", "bf16"), ("--aot-compile",), ("--no-aot-compile",)])
def test_options_of_programs_that_are_not_written(
    saved: Path, tmp_path: Path, option: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(saved, tmp_path / "out", *option) == 2
    assert "without --aot" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_compiling_without_a_compiler_is_refused_before_any_work(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run(saved, tmp_path / "out", "--aot", "--aot-compile") == 2
    assert "without a C++ compiler" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run(saved, tmp_path / "out", "--aot") == 0  # left out, it is done where it can be
    assert not list((tmp_path / "out").rglob("*.compiled.pt2"))


def full_disk(*_args: Any, **_options: Any) -> Any:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("safetensors.torch.save_file", ("--with-weights",)),
        ("dydit.deployment.folder.save_file", ("--aot", "--no-aot-compile")),
    ],
)
def test_a_full_disk_is_told_in_one_line(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    options: tuple[str, ...],
) -> None:
    monkeypatch.setattr(where, full_disk)
    assert run(saved, tmp_path / "out", *options) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told and "free space" in told and "Traceback" not in told
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
