"""TensorBoard and W&B get what metrics.jsonl gets, where they are installed."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from dydit.config import RunConfig
from dydit.errors import ConfigError, OutputError
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


def full_disk(*_args: Any, **_options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("start", "; free space, or remove it from train.trackers$"),
        ("log", r"; .*last good checkpoint is \S*step-00000002; continue with --resume auto$"),
        ("finish", r"; .*last good checkpoint is \S*step-00000004; continue with --resume auto$"),
    ],
    ids=["start", "log", "finish"],
)
def test_a_tracker_that_cannot_write_ends_the_run_in_one_line(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, method: str, message: str
) -> None:
    cfg = make_config(train={"steps": 4, "log_every": 3, "save_every": 2, "trackers": ["tensorboard"]})
    with monkeypatch.context() as patch:
        patch.setattr(trackers.TensorBoardTracker, method, full_disk)
        with pytest.raises(
            OutputError, match="tracker tensorboard cannot write: No space left on device" + message
        ):
            run_training(cfg)
    assert run_training(cfg, resume="auto").steps == 4


def test_a_disk_that_fills_up_in_tensorboards_own_thread(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the disk's end; closing what failed fails again."""
    cfg = make_config(train={"steps": 6, "log_every": 1, "save_every": 2, "trackers": ["tensorboard"]})
    told = tmp_path / "told"
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

            def fill(done: int, _metrics: Any) -> None:
                if done == 2:
                    (file,) = Path(cfg.output_dir, "tensorboard").glob("events.out.tfevents.*")
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, most))

            run_training(cfg, callback=fill)
        except OutputError as problem:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            told.write_text(str(problem))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    message = (
        r"tracker tensorboard cannot write: File too large; .*last good checkpoint is \S*step-00000002; "
    )
    assert re.search(message + "continue with --resume auto$", told.read_text())


def test_what_ended_a_run_is_not_hidden_by_a_tracker_that_cannot_close(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.TensorBoardTracker, "finish", full_disk)

    def fail(_step: int, _metrics: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(make_config(train={"trackers": ["tensorboard"]}), callback=fail)


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
