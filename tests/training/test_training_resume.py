"""A run that was stopped, killed or crashed goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dydit.config import RunConfig, dump_config
from dydit.errors import CheckpointError, OutputError
from dydit.training import TrainResult, run_training
from dydit.training.checkpoint import load_checkpoint

MakeConfig = Callable[..., RunConfig]


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
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


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
    ],
    ids=["complete", "distill-flow-accumulate"],
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


KILLED_WHILE_SAVING = """
import os, signal, sys
from dydit.config import load_config
from dydit.training import checkpoint, run_training

write = checkpoint._write_manifest
def killed(folder, step):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, step)

checkpoint._write_manifest = killed
run_training(load_config(sys.argv[1]))
"""


def test_kill_9_during_a_save_loses_only_the_steps_since_the_last_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    straight = run_training(make_config("straight"))
    config = make_config("killed")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    child = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    run = Path(config.output_dir)
    assert list(
        (run / "checkpoints").glob(".step-00000008*")
    )  # half-written, under a name that is no checkpoint
    assert (run / "latest").read_text() == "checkpoints/step-00000004\n"
    assert_same_run(straight, run_training(config, resume="auto"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]


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


def test_a_resumed_run_may_have_more_steps_and_another_rate(make_config: MakeConfig) -> None:
    run_training(make_config(train={"steps": 4}))
    longer = run_training(make_config(train={"steps": 6, "lr": 5e-4, "log_every": 1}), resume="auto")
    assert longer.steps == 6 and longer.metrics["lr"] == 5e-4
    assert [record["step"] for record in records(longer)] == [4, 5, 6]
