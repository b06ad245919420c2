"""Every file in configs/ loads, and opens with the command that runs it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from dydit.config import RunConfig, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))
PUBLISHED_BATCH = 256  # of DyDiT's recipes


def command(path: Path) -> list[str]:
    return shlex.split(path.read_text().splitlines()[0].removeprefix("# "))


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_opens_with_its_command(path: Path) -> None:
    config, words = load_config(path), command(path)
    assert words[-2:] == [config.task, f"configs/{path.name}"]
    launcher = option(words, "--config_file")
    if launcher is None:
        assert words[0] == "dydit"
    else:
        assert words[:2] == ["accelerate", "launch"] and words[4:6] == ["-m", "dydit.cli"]
        assert (CONFIGS.parent / launcher).is_file()


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_file_is_one_for_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    words = command(path)
    assert option(words, "--config_file") == f"configs/accelerate/{path.name}"
    assert (CONFIGS.parent / words[-1]).is_file()
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1 and loaded.mixed_precision == "no"


def recipe(size: str, target: float) -> RunConfig:
    return load_config(CONFIGS / f"dydit_{size}_{target}.yaml")


@pytest.mark.parametrize("target", [0.7, 0.5, 0.3])
@pytest.mark.parametrize("size", ["s", "b", "xl"])
def test_the_published_settings(size: str, target: float) -> None:
    path = CONFIGS / f"dydit_{size}_{target}.yaml"
    cfg = load_config(path)
    launcher = yaml.safe_load((CONFIGS.parent / str(option(command(path), "--config_file"))).read_text())
    assert cfg.compute.target == target and cfg.compute.weight == 2.0
    assert cfg.data.batch_size * cfg.train.grad_accumulation * launcher["num_processes"] == PUBLISHED_BATCH
    assert cfg.train.ema_decay == 0.9999 and cfg.train.weight_decay == 0 and cfg.objective.stratified
    lr, ramp, clip = (2.5e-5, 5000, 50) if target == 0.7 else (1e-4, 1000, 200)
    assert (cfg.train.lr, cfg.compute.ramp_steps, cfg.train.clip_norm) == (lr, ramp, clip)
    steps = {"s": 50_000, "b": 100_000, "xl": 150_000 if target == 0.7 else 200_000}[size]
    warmup = 30_000 if size == "xl" and target != 0.7 else 0
    assert (cfg.train.steps, cfg.warmup.steps) == (steps, warmup)
