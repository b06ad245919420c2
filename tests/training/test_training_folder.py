"""A run folder is one run's, at a time, and nothing in it is replaced that the run did not write."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import train_in_child

from dydit.config import RunConfig, dump_config
from dydit.errors import ConfigError, OutputError
from dydit.training import folder, run_training

MakeConfig = Callable[..., RunConfig]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_trained_model_without_its_checkpoints_is_not_replaced(
    make_config: MakeConfig, resume: str | None
) -> None:
    cfg = make_config(train={"steps": 4})
    run_training(cfg)
    run = Path(cfg.output_dir)
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    with pytest.raises(OutputError, match=r"run holds model, which the run would replace; expected a new"):
        run_training(cfg, resume=resume)
    assert contents(run) == before


@pytest.mark.parametrize("text", ["# mine\ntask: finetune\n", "not: a run's\n", "\udcff"])
@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_configuration_that_no_run_wrote_is_not_replaced(
    make_config: MakeConfig, resume: str | None, text: str
) -> None:
    cfg = make_config(train={"steps": 4})
    file = Path(cfg.output_dir, "config.yaml")
    file.parent.mkdir()
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    before = contents(file.parent)
    with pytest.raises(OutputError, match=r"holds config\.yaml, which the run would replace"):
        run_training(cfg, resume=resume)
    assert contents(file.parent).items() >= before.items()


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_came_to_no_checkpoint_starts_again(make_config: MakeConfig, resume: str | None) -> None:
    """After a mistake in the first steps, with a setting changed."""
    first, cfg = make_config(train={"steps": 5}), make_config(train={"steps": 4})
    file = Path(cfg.output_dir, "config.yaml")
    file.parent.mkdir()
    file.write_text(dump_config(first))
    assert run_training(cfg, resume=resume).steps == 4


def test_two_processes_do_not_train_in_one_folder(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_WAIT_S", 0.0)
    cfg = make_config(train={"steps": 1000, "save_every": 1})
    run = Path(cfg.output_dir)
    child = train_in_child(cfg)
    try:
        deadline = time.monotonic() + 60
        while not (run / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for resume in (None, "auto"):
            with pytest.raises(OutputError, match=r"another process trains in .*run; expected one at a time"):
                run_training(cfg, resume=resume)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # A killed process holds nothing.
    assert run_training(cfg.model_copy(update={"train": short(cfg)}), resume="auto").steps >= 1


def short(cfg: RunConfig) -> Any:
    steps = max(
        int(path.name.removeprefix("step-")) for path in Path(cfg.output_dir).glob("checkpoints/step-*")
    )
    return cfg.train.model_copy(update={"steps": steps + 1})


def test_a_folder_is_free_again_after_an_error(make_config: MakeConfig) -> None:
    cfg = make_config(train={"steps": 4})

    def fail(_step: int, _metrics: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_training(cfg, callback=fail)
    assert run_training(cfg, resume="auto").steps == 4


def test_a_disk_that_knows_no_locks_is_told(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    assert run_training(make_config(train={"steps": 4})).steps == 4
    (said,) = [message for message in caplog.messages if "locked" in message]
    assert "run cannot be locked (" in said and said.endswith("make sure that one run at a time is in it")


def test_a_run_that_is_refused_leaves_nothing(make_config: MakeConfig) -> None:
    cfg = make_config(train={"trackers": ["wandb"]})
    with pytest.raises(ConfigError, match="wandb, which is not installed"):
        run_training(cfg)
    assert not Path(cfg.output_dir).exists()
