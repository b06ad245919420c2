"""TensorBoard and W&B get what metrics.jsonl gets, where they are installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dydit.config import RunConfig
from dydit.errors import ConfigError
from dydit.training import run_training, trackers


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a stand-in for TensorBoard was told."""
    told: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            Path(folder).mkdir(parents=True)
            told.append(("folder", folder))

        def add_hparams(self, values: dict[str, Any], metric_dict: dict[str, Any]) -> None:
            told.append(("settings", values))

        def add_scalar(self, name: str, value: float, global_step: int) -> None:
            told.append((name, value, global_step))

        def flush(self) -> None: ...

        def close(self) -> None:
            told.append(("closed",))

    module = ModuleType("tensorboardX")
    module.__spec__ = ModuleSpec("tensorboardX", None)
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    return told


def test_tensorboard_gets_settings_and_every_record(
    make_config: Callable[..., RunConfig], written: list[tuple[Any, ...]]
) -> None:
    cfg = make_config(train={"steps": 2, "log_every": 1, "trackers": ["tensorboard"]})
    run_training(cfg)
    assert written[0] == ("folder", str(Path(cfg.output_dir) / "tensorboard")) and written[-1] == ("closed",)
    settings = dict([written[1]])["settings"]
    assert settings["train.lr"] == 1e-3 and settings["train.betas"] == "[0.9, 0.999]"
    assert settings["train.router_lr"] == "None"
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        for name in line.keys() - {"step"}:
            assert (name, line[name], line["step"]) in written


def test_what_tensorboard_wrote_is_metrics_jsonl(make_config: Callable[..., RunConfig]) -> None:
    """TensorBoard itself, its files read back; a resumed run goes on in the same folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"log_every": 1, "save_every": 2, "trackers": ["tensorboard"]}
    run_training(make_config(train={"steps": 2, **settings}))
    cfg = make_config(train={"steps": 4, **settings})
    run_training(cfg, resume="auto")
    folder = Path(cfg.output_dir) / "tensorboard"
    found: dict[tuple[str, int], float] = {}
    for file in folder.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.update({(name, event.step): event.value for event in events.Scalars(name)})
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    wanted = {(name, r["step"]): r[name] for r in records for name in r if name != "step"}
    assert len(records) == 4 and found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key  # event files hold float32
    (written, *_) = folder.glob("*/hparams.yml")
    assert yaml.safe_load(written.read_text())["train.steps"] in (2, 4)


def test_a_tracker_that_is_not_installed_is_refused_before_training(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    cfg = make_config(train={"trackers": ["wandb"]})
    with pytest.raises(
        ConfigError, match=r"train\.trackers has wandb, which is not installed; pip install wandb"
    ):
        run_training(cfg)
    assert not (Path(cfg.output_dir) / "metrics.jsonl").exists()


def test_runs_of_one_name_are_different_runs_of_wandb(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []

    class Stand:
        """In W&B's place."""

        def __init__(self, _project: str, **options: Any) -> None:
            started.append(options)

        def start(self) -> None: ...

        def store_init_configuration(self, _settings: dict[str, Any]) -> None: ...

        def log(self, _values: dict[str, float], step: int) -> None: ...

        def finish(self) -> None: ...

    monkeypatch.setattr(trackers, "WandBTracker", Stand)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    for name, steps, resume in (("a/run", 1, None), ("b/run", 1, None), ("a/run", 2, "auto")):
        cfg = make_config(name, train={"steps": steps, "trackers": ["wandb"]})
        run_training(cfg, resume=resume)
        assert (Path(cfg.output_dir) / "wandb_id").read_text() == started[-1]["id"] + "\n"
    assert [options["name"] for options in started] == ["run"] * 3
    first, second, resumed = [options["id"] for options in started]
    assert first != second and resumed == first and len(first) == 16
