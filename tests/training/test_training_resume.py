"""A run that was stopped, killed or crashed goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import train_in_child

from dydit.config import RunConfig
from dydit.errors import CheckpointError, OutputError
from dydit.training import TrainResult, checkpoint, loop, run_training
from dydit.training.checkpoint import Snapshot, load_checkpoint, verify
from dydit.training.checks import check_same_data
from dydit.training.data import Digits
from dydit.training.metrics import MetricsFile

MakeConfig = Callable[..., RunConfig]
CLOCK = ("images_per_s", "eta_s")  # what no two runs have in common


def stop_at(step: int) -> Callable[[int, Any], None]:
    """A callback that sends SIGTERM to this process after ``step``."""

    def callback(done: int, _metrics: Any) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


def assert_same_run(one: TrainResult, other: TrainResult) -> None:
    """Same weights, averages, moments, generators, positions and metrics, bit by bit."""
    assert one.checkpoint is not None and other.checkpoint is not None
    first, second = load_checkpoint(one.checkpoint), load_checkpoint(other.checkpoint)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[name].keys() and tensors
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second.tensors[name][key]), f"{name}: {key}"
    for key in ("progress", "processes", "ema_steps"):
        assert first.state[key] == second.state[key], key
    assert records(one) == records(other)


def records(result: TrainResult) -> list[dict[str, float]]:
    assert result.checkpoint is not None
    lines = (result.checkpoint.parents[1] / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "train": {
                "grad_accumulation": 2,
                "lr_schedule": "cosine",
                "lr_warmup_steps": 3,
                "router_lr": 0.1,
            },
            "warmup": {"mode": "distill"},
            "objective": {"name": "flow"},
            "sampler": {"name": "flow_euler"},
        },
        {"train": {"diffusion_weight": 0.0}, "warmup": {"mode": "none"}},
    ],
    ids=["complete", "distill-flow-accumulate", "compute-alone"],
)
def test_sigterm_and_resume_equals_a_straight_run(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    straight = run_training(make_config("straight", **changes))
    stopped = run_training(make_config("stopped", **changes), callback=stop_at(6))
    assert stopped.stopped and stopped.model_dir is None and stopped.steps in (6, 7)
    resumed = run_training(make_config("stopped", **changes), resume="auto")
    assert resumed.steps == 12 and not resumed.stopped
    assert_same_run(straight, resumed)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pretraining_resumes_as_exactly(pretrain_config: MakeConfig) -> None:
    straight = run_training(pretrain_config("straight"))
    run_training(pretrain_config("stopped"), callback=stop_at(5))
    assert_same_run(straight, run_training(pretrain_config("stopped"), resume="auto"))


MOMENTS = 12  # seeds: each kills one run with SIGKILL at two random moments


def killed_at(cfg: RunConfig, moment: int) -> int:
    """Train in a child that kills itself at the ``moment``-th event of its saves and steps; its exit status.

    The child is forked with everything imported: starting Python for every kill would take minutes.

    An event is a step, or a call by which a save makes, syncs, renames or deletes something: between any two
    of them the disk is in another state.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = moment

    def event(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            event()
            return function(*args, **options)

        return wrapper

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for module, name in (
            (os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (checkpoint, "save_file"),
            (checkpoint, "_write_manifest"),
        ):  # fmt: skip
            setattr(module, name, before(getattr(module, name)))
        run_training(cfg, resume="auto", callback=event)
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("seed", range(MOMENTS))
def test_kill_9_at_any_moment_and_resume_equals_a_straight_run(make_config: MakeConfig, seed: int) -> None:
    """Killed twice, at random events of steps and saves, then resumed to the end."""
    straight = run_training(make_config("straight", train={"log_every": 3}))
    cfg, rng = make_config("killed", train={"log_every": 3}), random.Random(seed)
    for _ in range(2):
        status = killed_at(cfg, rng.randint(1, 75))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or status == 0, status
        for folder in (Path(cfg.output_dir) / "checkpoints").glob("step-*"):
            verify(folder)  # whatever has a checkpoint's name is whole
    assert_same_run(straight, run_training(cfg, resume="auto"))
    assert [path.name for path in Path(cfg.output_dir).rglob(".*")] == [".lock"]


def test_kill_9_from_outside(make_config: MakeConfig) -> None:
    """As a scheduler or the kernel does it, wherever the process happens to be."""
    straight, cfg = run_training(make_config("straight")), make_config("killed")
    child = train_in_child(cfg)
    while not (Path(cfg.output_dir) / "latest").exists():  # the first save has come through
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        os.sched_yield()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert_same_run(straight, run_training(cfg, resume="auto"))


@pytest.mark.parametrize(
    ("step", "room", "message", "left"),
    [
        # After the save at 4, before the one at 8.
        (5, 20_000, r"checkpoint at step 8 was not saved .*step 4 is intact.*--resume auto", [4]),
        (
            4,  # the first log line comes after 5
            10,
            r"cannot write \S*metrics\.jsonl: .*last good checkpoint is \S*step-00000004; "
            "continue with --resume auto",
            [4],
        ),
        (
            12,  # the last
            20_000,
            r"model cannot be written .*last good checkpoint is \S*step-00000012; "
            "continue with --resume auto",
            [8, 12],
        ),
    ],
    ids=["checkpoint", "log", "export"],
)
def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_last_checkpoint(
    make_config: MakeConfig, tmp_path: Path, step: int, room: int, message: str, left: list[int]
) -> None:
    """A limit on the size of files stands in for the disk's end: real writes fail halfway, with EFBIG.

    Args:
        step: after which the disk is full.
        room: bytes that a file may have from then on.
        message: what the run ends with.
        left: steps of the checkpoints that are there then.
    """
    straight, cfg = run_training(make_config("straight")), make_config("full")
    told = tmp_path / "told"
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

            def fill(done: int, _metrics: Any) -> None:
                if done == step:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))

            run_training(cfg, callback=fill)
        except OutputError as problem:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            told.write_text(str(problem))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert re.search(message, told.read_text())
    checkpoints = Path(cfg.output_dir) / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())  # nothing half-written is left
    assert names == [checkpoint.checkpoint_name(number) for number in left]
    resumed = run_training(cfg, resume="auto")
    assert_same_run(straight, resumed)
    assert resumed.model_dir is not None and resumed.model_dir.is_dir()


@pytest.mark.parametrize(
    ("place", "name", "message"),
    [
        (MetricsFile, "append", "last good checkpoint is {0}; continue with --resume {0}"),
        (checkpoint, "save_file", "step 8 was not saved in {1}: full; free space and use --resume {0}"),
    ],
    ids=["log", "checkpoint"],
)
def test_a_full_disk_before_the_first_save_of_a_run_from_elsewhere_names_where_it_came_from(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, message: str
) -> None:
    """``auto`` would start over there."""
    first, cfg = run_training(make_config(train={"steps": 4})), make_config("other", train={"log_every": 2})

    def full(*_: Any) -> None:
        raise OutputError("full")

    monkeypatch.setattr(place, name, full)
    told = message.format(first.checkpoint, cfg.output_dir)
    with pytest.raises(OutputError, match=re.escape(told) + "$"):
        run_training(cfg, resume=str(first.checkpoint))


def test_a_corrupt_newest_checkpoint_is_passed_over(make_config: MakeConfig) -> None:
    straight = run_training(make_config("straight"))
    newest = run_training(make_config("again")).checkpoint
    assert newest is not None
    (newest / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has 0 bytes"):
        run_training(make_config("again"), resume=str(newest))
    assert_same_run(straight, run_training(make_config("again"), resume="auto"))


def test_a_finished_run_stays_finished(make_config: MakeConfig) -> None:
    first = run_training(make_config(train={"steps": 4}))
    again = run_training(make_config(train={"steps": 4}), resume="auto")
    assert_same_run(first, again)
    assert again.metrics == first.metrics and again.model_dir == first.model_dir


def test_a_run_is_not_started_over_another(make_config: MakeConfig) -> None:
    first = run_training(make_config(train={"steps": 4}))
    with pytest.raises(
        OutputError, match=r"holds a run already, up to step 4; continue it with --resume auto"
    ):
        run_training(make_config(train={"steps": 4}))
    run_training(make_config("other", train={"steps": 4}))
    with pytest.raises(OutputError, match="holds a run already"):
        run_training(make_config("other"), resume=str(first.checkpoint))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "made with seed=0, this run has seed=1"),
        ({"dydit": {"temperature": 2.0}}, r"dydit\.temperature=1\.0, this run has dydit\.temperature=2\.0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    make_config: MakeConfig, change: dict[str, Any], message: str
) -> None:
    run_training(make_config(train={"steps": 4}))
    with pytest.raises(CheckpointError, match=message):
        run_training(make_config(train={"steps": 8}, **change), resume="auto")


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else ``auto`` would return to them, with the lines between missing in the log."""
    changes = {"train": {"keep_last": 3}}
    straight, again = run_training(make_config("straight", **changes)), make_config("again", **changes)
    run_training(again)
    checkpoints = Path(again.output_dir) / "checkpoints"

    def fail(_step: int, _metrics: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(again, resume=str(checkpoints / "step-00000004"), callback=fail)
    assert "deleted the checkpoints after it, which are left behind: step 12, 8" in capsys.readouterr().err
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    assert_same_run(straight, run_training(again, resume="auto"))


def test_a_checkpoint_that_does_not_fit_leaves_the_later_ones_alone(make_config: MakeConfig) -> None:
    run_training(make_config())
    checkpoints = Path(make_config().output_dir) / "checkpoints"
    with pytest.raises(CheckpointError, match="made with seed=0"):
        run_training(make_config(seed=1), resume=str(checkpoints / "step-00000008"))
    assert len(list(checkpoints.iterdir())) == 2


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            ["none"],
            r"the 2 processes found different checkpoints in \S+: step-00000004 \(\w+\) on 1, none on 1",
        ),
        (
            ["step-00000004 (cafecafe)"] * 3,  # of another run
            r"the 4 processes .*: step-00000004 \(\w+\) on 1, step-00000004 \(cafecafe\) on 3",
        ),
    ],
)
def test_processes_that_find_different_checkpoints_are_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, others: list[str], message: str
) -> None:
    run_training(make_config(train={"steps": 4}))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "gather_object", lambda seen: [*seen, *others])
        with pytest.raises(
            CheckpointError, match=message + "; expected the same one on all; set output_dir to a disk"
        ):
            run_training(make_config(train={"steps": 5}), resume="auto")
        patch.setattr(loop, "gather_object", lambda seen: seen * 2)
        assert run_training(make_config(train={"steps": 5}), resume="auto").steps == 5


def test_a_run_that_only_one_process_has_is_told_to_all(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(make_config(train={"steps": 4}))
    monkeypatch.setattr(loop, "gather_object", lambda seen: [*seen, "none"])
    with pytest.raises(
        CheckpointError, match=r"none \(.* holds a run already, up to step 4.*\) on 1, none on 1"
    ):
        run_training(make_config(train={"steps": 4}))


def test_another_number_of_samples_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(make_config(train={"steps": 4}))
    monkeypatch.setattr(Digits, "__len__", lambda _self: 1000)
    with pytest.raises(
        CheckpointError, match="made with 1797 samples of data, this run has 1000; set data back"
    ):
        run_training(make_config(train={"steps": 5}), resume="auto")


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"name": "shapes"}, r"data\.name=digits, this run has data\.name=shapes"),
        ({"name": "shapes"}, {"name": "shapes", "seed": 1}, r"data\.seed=0, this run has data\.seed=1"),
    ],
)
def test_other_data_is_refused(
    make_config: MakeConfig, before: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    state = {"config": make_config(data=before).model_dump(mode="json"), "samples": 1797}
    with pytest.raises(CheckpointError, match=message + "; set data back, or start in another output_dir"):
        check_same_data(make_config(data=now), 1797, state)


def test_a_moved_folder_is_told_and_no_more(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def config(place: str, **changes: Any) -> RunConfig:
        data = {"name": "latents", "path": f"{place}/data"}
        return make_config(data=data, backbone=f"{place}/backbone", **changes)

    state = {"config": config("old").model_dump(mode="json")}  # from before the samples were counted
    check_same_data(config("old"), 5, state)
    assert not caplog.messages
    check_same_data(config("new"), 5, state)
    told = "the checkpoint was made with {0}=old/{1}, this run has {0}=new/{1}: "
    same = "the results are the same if the files are"
    assert caplog.messages == [told.format("data.path", "data") + same]
    caplog.clear()
    check_same_data(config("new", warmup={"mode": "distill"}), 5, state)
    assert caplog.messages[1] == told.format("backbone", "backbone") + same


def test_a_checkpoint_from_before_a_setting_existed_goes_on(make_config: MakeConfig) -> None:
    """What is new has a default that means what was done before."""
    first = run_training(make_config(train={"steps": 4}))
    assert first.checkpoint is not None
    saved = load_checkpoint(first.checkpoint)
    older = {**saved.state, "config": json.loads(json.dumps(saved.state["config"]))}
    del older["config"]["dydit"]["nested"], older["samples"]
    checkpoint.save_checkpoint(Path(make_config("older").output_dir), Snapshot(4, saved.tensors, older))
    assert run_training(make_config("older", train={"steps": 5}), resume="auto").steps == 5
    with pytest.raises(CheckpointError, match=r"dydit\.nested=False, this run has dydit\.nested=True"):
        run_training(make_config("older", train={"steps": 6}, dydit={"nested": True}), resume="auto")


def test_a_resumed_run_may_have_more_steps_and_another_rate(make_config: MakeConfig) -> None:
    run_training(make_config(train={"steps": 4}))
    longer = run_training(make_config(train={"steps": 6, "lr": 5e-4, "log_every": 1}), resume="auto")
    assert longer.steps == 6 and longer.metrics["lr"] == 5e-4
    assert [record["step"] for record in records(longer)] == [4, 5, 6]
