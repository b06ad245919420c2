"""SIGTERM and Ctrl-C, to the training process and to the loader processes beside it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from dydit.config import DataConfig, RunConfig
from dydit.shapes import ModelShape
from dydit.training import run_training
from dydit.training.checkpoint import verify
from dydit.training.data import Batch, make_dataset
from dydit.training.samples import batches
from dydit.training.signals import stop_on_signal

SHAPE = ModelShape(
    sample_size=(8, 8), patch_size=2, in_channels=1, out_channels=2, hidden_size=32, depth=2, num_heads=4,
    mlp_hidden=128, mlp_groups=4, num_classes=10,
)  # fmt: skip
LIMIT = 30.0  # seconds until a process that should end counts as hanging


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_sigterm_asks_however_often_it_comes() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signal() as stop:
        assert not stop
        for _ in range(3):
            send(signal.SIGTERM)
            assert stop and stop.signal_name == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which a process that a shell started in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_interrupt_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        send(signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        send(signal.SIGTERM)  # a launcher passes the end on in its own way
        assert stop.signal_name == "SIGINT"
        send(signal.SIGINT)


class Group:
    """A forked child as leader of its own process group, and a pipe that all of the group hold open.

    Args:
        body: what the child does; gets the pipe to write to.
    """

    def __init__(self, body: Callable[[int], None]) -> None:
        self.pipe, write = os.pipe()
        self.leader = os.fork()
        if self.leader == 0:
            try:
                os.setsid()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                body(write)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(write)

    def read(self) -> bytes:
        """A byte that the child wrote; empty when nobody of the group is left."""
        assert select.select([self.pipe], [], [], LIMIT)[0], "the group hangs"
        return os.read(self.pipe, 1)

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.leader, 0)[1])


def stream() -> Iterator[Batch]:
    config = DataConfig(batch_size=4, num_workers=1)
    return batches(make_dataset(config), config, SHAPE, seed=0)


def test_sigterm_to_all_processes_twice_ends_in_a_checkpoint(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """As a scheduler sends it to all, and then the launcher again."""
    cfg, sent = make_config(data={"num_workers": 1}, train={"save_every": 100}), tmp_path / "sent"

    def run(pipe: int) -> None:
        def between_steps(step: int, _metrics: object) -> None:
            if step == 3:
                os.write(pipe, b"3")
                while not sent.exists():
                    time.sleep(0.01)

        assert run_training(cfg, callback=between_steps).stopped

    group = Group(run)
    assert group.read() == b"3"
    for _ in range(2):
        os.killpg(group.leader, signal.SIGTERM)
        time.sleep(0.3)  # so that they come one by one
    sent.touch()
    assert group.read() == b"" and group.exit_code() == 0
    (saved,) = (Path(cfg.output_dir) / "checkpoints").iterdir()
    verify(saved)
    assert saved.name == "step-00000004"


def test_loaders_end_with_a_process_that_left_them_open() -> None:
    """At exit multiprocessing sends them SIGTERM and waits: who ignores it is waited for without end."""
    kept = []

    def leave() -> None:
        kept.append(stream())
        next(kept[0])

    process = get_context("fork").Process(target=leave)
    process.start()
    process.join(LIMIT)
    hangs = process.is_alive()
    process.kill()
    assert not hangs and process.exitcode == 0


class Stuck:
    """A data set on a disk that does not answer; writes to ``pipe`` when it is asked."""

    num_classes, sample_shape = 10, (1, 8, 8)

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        os.write(self.pipe, b"1")
        time.sleep(10 * LIMIT)
        raise OSError("no answer")


def test_a_stuck_loader_ends_after_a_main_process_that_was_killed() -> None:
    def load(pipe: int) -> None:
        next(batches(Stuck(pipe), DataConfig(batch_size=4, num_workers=1), SHAPE, seed=0))

    group = Group(load)
    assert group.read() == b"1"
    os.kill(group.leader, signal.SIGKILL)
    assert group.exit_code() == -signal.SIGKILL
    os.killpg(group.leader, signal.SIGTERM)  # the loader would notice without, some seconds later
    assert group.read() == b""
