"""Configurations: what is read is what was written, and every mistake is told in one line with its key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dydit.config import (
    ComputeConfig,
    DyDiTConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    SamplerConfig,
    TrainConfig,
    dump_config,
    find_path,
    load_config,
)
from dydit.config.problems import known_keys, section_of
from dydit.config.sections import SamplerName
from dydit.config.text import dump_yaml, parse_yaml
from dydit.errors import ConfigError

FINETUNE = """\
task: finetune
output_dir: runs/a
backbone: some/backbone
train: {steps: 100}
"""

PRETRAIN = """\
task: pretrain
output_dir: runs/a
model: {preset: DiT-S/2, sample_size: [8, 16]}
train: {steps: 100}
"""


@pytest.fixture
def finetune(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FINETUNE)
    return path


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", [FINETUNE, PRETRAIN])
def test_dump_loads_back_equal(tmp_path: Path, text: str) -> None:
    source, copy = tmp_path / "run.yaml", tmp_path / "copy.yaml"
    source.write_text(text)
    config = load_config(source)
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


positive = st.floats(1e-12, 1e6)
words = st.text(min_size=1).filter(lambda text: "/" not in text and "\0" not in text)


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    flow = draw(st.booleans())
    samplers = [name for name in get_args(SamplerName) if name.startswith("flow_") == flow]
    return RunConfig(
        task="finetune",
        output_dir=draw(words),
        # A name that no folder has: an existing one beside the package would be found there.
        backbone=f"no-such-model-{draw(words)}",
        seed=draw(st.integers(0, 2**32 - 1)),
        objective=ObjectiveConfig(name="flow" if flow else "iddpm"),
        sampler=SamplerConfig(
            name=draw(st.sampled_from(samplers)), guided_channels=draw(st.none() | st.integers(1, 9))
        ),
        train=TrainConfig(
            steps=draw(st.integers(1, 10**9)),
            lr=draw(positive),
            betas=draw(st.tuples(st.floats(0, 0.999), st.floats(0, 0.999))),
            clip_norm=draw(st.none() | positive),
            mixed_precision=draw(st.sampled_from(["no", "bf16", "fp16"])),
        ),
        compute=ComputeConfig(target=draw(st.floats(1e-9, 1))),
    )


@given(run_configs())
@hypothesis_settings(deadline=None, max_examples=50)
def test_any_config_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)


@given(st.recursive(plain, nested))
@hypothesis_settings(deadline=None, max_examples=100)
def test_any_value_survives_yaml(value: Any) -> None:
    assert parse_yaml(dump_yaml(value)) == value


@given(
    st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12), st.sampled_from(["", "train.", "model."])
)
@hypothesis_settings(deadline=None, max_examples=50)
def test_any_unknown_key_is_named_with_a_known_one(
    tmp_path_factory: pytest.TempPathFactory, name: str, section: str
) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(FINETUNE)
    known = known_keys(RunConfig)
    if section + name in known:
        return
    told = message(path, f"{section}{name}=1")
    assert f"unknown key {section}{name};" in told
    assert told.rpartition("did you mean ")[2].rstrip("?") in known


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.lrr=1", "train.lr"),
        ("lr=1", "train.lr"),
        ("trian.lr=1", "train.lr"),
        ("sampelr.steps=1", "sampler.steps"),
        ("compute.targt=0.5", "compute.target"),
        ("output=x", "output_dir"),
    ],
)
def test_nearest_key(finetune: Path, override: str, nearest: str) -> None:
    assert message(finetune, override).endswith(f"did you mean {nearest}?")


def test_unknown_key_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FINETUNE.replace("steps: 100", "step: 100"))
    # The misspelt key is why `steps` is missing, so it is told first.
    assert message(path).startswith("unknown key train.step; did you mean train.steps?")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=2e-5", 2e-5),
        ("train.lr=1E-4", 1e-4),
        ("train.lr=1.5e-05", 1.5e-5),
        ("train.lr=.5", 0.5),
        ("train.lr=1", 1.0),
        ("train.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("train.mixed_precision=no", "no"),
        ("train.clip_norm=", None),
        ("train.steps=1_000", 1000),
        ("data.flip=true", True),
        ("output_dir=2020-01-01", "2020-01-01"),
        ("output_dir=a=b", "a=b"),
    ],
)
def test_override_values(finetune: Path, override: str, expected: object) -> None:
    value: Any = load_config(finetune, [override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_the_last_override_counts(finetune: Path) -> None:
    assert load_config(finetune, ["train.steps=2", "train.steps=3"]).train.steps == 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lr=-1", ["train.lr is -1", "greater than 0", "learning rate"]),
        ("train.lr=fast", ["train.lr is 'fast'", "a number"]),
        ("train.lr=.inf", ["train.lr is inf", "finite"]),
        ("train.steps=1.5", ["train.steps is 1.5", "a whole number"]),
        ("train.steps=true", ["train.steps is True", "a whole number"]),
        ("train.betas=[0.9, 2]", ["train.betas is 2", "less than 1"]),
        ("train=5", ["train is 5", "a mapping"]),
        ("train={}", ["train.steps is missing", "optimiser steps"]),
        ("data.flip=yes", ["data.flip is 'yes'", "true or false"]),
        ("compute.target=0", ["compute.target is 0", "greater than 0"]),
        ("compute.target=1.5", ["compute.target is 1.5", "less than or equal to 1"]),
        ("task=train", ["task is 'train'", "'pretrain' or 'finetune'"]),
        ("output_dir=", ["output_dir is empty", "text"]),
        ("sampler.steps=2000", ["sampler.steps is 2000 with 1000", "1000 or less"]),
        ("sampler.name=flow_euler", ["sampler.name is flow_euler", "objective.name iddpm", "ddim"]),
        ("objective.num_timesteps=500", ["sampler.num_train_timesteps", "objective.num_timesteps", "same"]),
        ("data.name=latents", ["data.name is latents", "path"]),
        ("model={preset: DiT-S/2}", ["model is set for task finetune", "remove"]),
        ("model={preset: DiT-S/2, depth: 2}", ["model.preset DiT-S/2 together with depth"]),
        ("backbone=", ["backbone is missing"]),
        ("task=pretrain", ["model is missing for task pretrain"]),
        ("train", ["override 'train'", "key=value"]),
        ("=1", ["override '=1'", "key=value"]),
        ("train.lr=[1", ["override 'train.lr=[1'", "not YAML"]),
        ("train={steps: a, lr: b}", ["train.steps is 'a'", "also wrong: train.lr"]),
        ("train={steps: 1, steps: 2}", ["steps is given twice"]),
    ],
)
def test_wrong_values(finetune: Path, override: str, parts: list[str]) -> None:
    told = message(finetune, override)
    for part in parts:
        assert part in told


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "holds nothing"),
        (b"- a\n- b\n", "holds a list"),
        (b"task: [1\n", "not YAML"),
        (b"a: 1\n\tb: 2\n", "line 2"),
        (b"\xff\xfe\xff", "not UTF-8"),
        (b"!!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert part in message(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "No such file" in message(tmp_path / "none.yaml")
    assert "Is a directory" in message(tmp_path)


def test_constructors_tell_mistakes_in_one_line() -> None:
    calls: list[tuple[type[BaseModel], dict[str, Any]]] = [
        (DyDiTConfig, {"tempreature": 3.0}),
        (ModelConfig, {}),
        (TrainConfig, {"steps": "many"}),
        (SamplerConfig, {"steps": 2000}),
        (RunConfig, {"task": "finetune", "output_dir": "a", "backbone": "b", "train": {"steps": 0}}),
    ]
    for section, arguments in calls:
        with pytest.raises(ConfigError, match=r"^[^\n]+$"):
            section(**arguments)


def test_nested_errors_keep_their_full_key() -> None:
    settings: dict[str, Any] = {"output_dir": "a", "backbone": "b", "train": {"steps": 0}}
    with pytest.raises(ConfigError, match=r"^train\.steps is 0"):
        RunConfig(task="finetune", **settings)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DyDiTConfig().threshold = 0.7


def test_every_setting_says_what_it_is() -> None:
    for key, field in known_keys(RunConfig).items():
        assert field.description, key
        section = section_of(field)
        assert section is None or section.__doc__, key


def test_dit_arguments_hold_what_was_given() -> None:
    arguments = ModelConfig(
        patch_size=1, hidden_size=128, depth=6, num_heads=8, sample_size=8
    ).dit_arguments()
    assert arguments["hidden_size"] == 128
    assert "preset" not in arguments
    assert "depth" not in ModelConfig(preset="DiT-S/2").dit_arguments()


def test_paths_are_found_here_first_then_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = find_path(os.path.join("dydit", "config"))
    assert os.path.isabs(beside) and os.path.isdir(beside)
    (tmp_path / "dydit" / "config").mkdir(parents=True)
    assert find_path(os.path.join("dydit", "config")) == os.path.join("dydit", "config")
    assert find_path("facebook/DiT-XL-2-256") == "facebook/DiT-XL-2-256"


def test_the_backbone_is_found_beside_the_package(
    finetune: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = load_config(finetune, ["backbone=dydit/config"]).backbone
    assert backbone is not None and os.path.isdir(backbone)


def test_no_torch_is_imported() -> None:
    code = "import sys, dydit.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
