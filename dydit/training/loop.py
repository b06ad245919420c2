"""The loop around ``Trainer``: steps, logs, checkpoints, and the run folder they go to."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from dydit.config import RunConfig, dump_config
from dydit.errors import CheckpointError, DyditError, OutputError, TrainingError
from dydit.files import new_folder, write_file
from dydit.models.fixed_positions import computed_left_out
from dydit.precision import converted_copy
from dydit.training.checkpoint import (
    CHECKPOINTS,
    Snapshot,
    identity,
    leave_behind,
    load_checkpoint,
    prune,
    remove_scratch,
    save_checkpoint,
)
from dydit.training.checks import SAMPLES, check_same_data
from dydit.training.data import LabelledImages
from dydit.training.folder import CONFIG_FILE, MODEL_FOLDER, RunFolder, is_inside
from dydit.training.metrics import MetricsFile, one_line
from dydit.training.rng import scoped_rng
from dydit.training.signals import StopRequest, stop_on_signal
from dydit.training.trackers import Trackers, check_trackers
from dydit.training.trainer import Trainer

OnStep = Callable[[int, Mapping[str, float] | None], None]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Args:
        steps: optimiser steps done.
        model: the model with the averaged weights, in evaluation mode.
        metrics: the last record of metrics.jsonl.
        checkpoint: folder of the last checkpoint; None after a dry run.
        model_dir: folder with the exported averaged weights; None unless the run is finished.
        stopped: the run was asked to stop before its last step.
    """

    steps: int
    model: Any
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    model_dir: Path | None = None
    stopped: bool = False


def train(
    model: Any, cfg: RunConfig, dataset: LabelledImages, *,
    frozen_backbone: Any = None, resume: str | None = None, on_step: OnStep | None = None,
) -> TrainResult:  # fmt: skip
    """Train a model that is already built, into the run folder ``cfg.output_dir``.

    The caller's random number generators are left as they were. SIGTERM and Ctrl-C end the run after the
    current step with a checkpoint. Arguments and errors as for ``run_training``.

    Args:
        model: trained in place; ends with the averaged weights, on the device that it was trained on.
        cfg: the run.
        dataset: training samples.
        frozen_backbone: teacher for ``warmup.mode`` distill; frozen, and moved to that device.
        resume: as for ``run_training``.
        on_step: as ``callback`` there.
    """
    run = Path(cfg.output_dir)
    with scoped_rng(), stop_on_signal() as stop:
        trainer = Trainer(model, cfg, dataset, frozen_backbone)
        loop = Loop(trainer, run, on_step)
        with loop.folder_held():
            try:
                loop.open(resume)
                stopped = loop.run(stop)
            except BaseException:
                loop.abandon()
                raise
            loop.close()
            metrics, checkpoint = loop.record, loop.checkpoint
            steps, is_main = trainer.progress.step, trainer.accelerator.is_main_process
            trained = trainer.close()
            exported = None if stopped else loop.export(trained)
    if stopped:
        by = stop.signal_name or "another process"
        _say(f"stopped by {by} at step {steps}; continue with --resume auto", is_main)
    return TrainResult(steps, trained, metrics, checkpoint, exported, stopped)


class Loop:
    """Steps, logs and checkpoints of one run, in this order within a step."""

    def __init__(self, trainer: Trainer, run: Path, on_step: OnStep | None = None) -> None:
        self.trainer, self.run_folder, self.on_step = trainer, run, on_step
        self._folder = RunFolder(run)
        self.is_main: bool = trainer.accelerator.is_main_process
        self.file = MetricsFile(run, enabled=self.is_main)
        self.record: Mapping[str, float] = {}
        self.checkpoint: Path | None = None
        self._trackers: Trackers | None = None  # of the main process
        self._timed_from, self._timed_step = time.perf_counter(), 0

    @contextmanager
    def folder_held(self) -> Iterator[None]:
        """Keep other runs out of the run folder within the ``with``; one to be made is held once it is there.

        Raises:
            OutputError: on every process: it cannot be written, or another run is in it.
        """
        self._on_main(self._folder.hold_if_there)
        try:
            yield
        finally:
            self._folder.release()

    def open(self, resume: str | None) -> None:
        """Take up a checkpoint, if asked, and prepare the run folder.

        Raises:
            OutputError: folder or tracker cannot be written, or another run is in it; and as ``take_up``.
            CheckpointError, ConfigError: as ``take_up``.
        """
        self.take_up(resume)
        self._on_main(lambda: self._prepare(resume))

    def take_up(self, resume: str | None) -> None:
        """Load the checkpoint that ``resume`` means, if any; writes nothing.

        Raises:
            OutputError: the folder holds a run and ``resume`` does not continue it.
            CheckpointError: the checkpoint is broken, belongs to another run, or is not the same one on all
                processes.
            ConfigError: a tracker is not installed.
        """
        trainer = self.trainer
        check_trackers(trainer.cfg.train.trackers)
        snapshot = self._snapshot_of(resume)
        if snapshot is not None:
            check_same_data(trainer.cfg, len(trainer.dataset), snapshot.state)
            trainer.load(snapshot)
            self.record = snapshot.state["metrics"]
            _say(f"resumed at step {trainer.progress.step} from {self.checkpoint}", self.is_main)

    def _prepare(self, resume: str | None) -> None:
        """Start the trackers, which may refuse; then clear the run folder of what is no longer the run's."""
        run, trainer = self.run_folder, self.trainer
        self._folder.hold()
        self._trackers = Trackers(trainer.cfg)
        remove_scratch(run)
        if resume is not None and self.checkpoint == Path(resume):
            self._leave_behind(self.checkpoint)
        write_file(run / CONFIG_FILE, dump_config(trainer.cfg))
        self.file.truncate(trainer.progress.step)

    def close(self) -> None:
        """Flush the trackers; every process learns whether it worked.

        Raises:
            OutputError: one could not be written; names the last good checkpoint.
        """
        self._write(self._finish)

    def abandon(self) -> None:
        """Flush the trackers as far as they can be: an error is on its way that is not to be hidden."""
        with suppress(Exception):
            self._finish()

    def _finish(self) -> None:
        if self._trackers is not None:
            self._trackers.finish()

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step; returns whether the run was stopped before it.

        Raises:
            TrainingError: the loss stayed non-finite.
            OutputError: a log line, a tracker's record or a checkpoint could not be written.

        Both name the last good checkpoint.
        """
        progress, steps = self.trainer.progress, self.trainer.cfg.train.steps
        self._restart_clock()
        hidden = None if self.is_main else True  # None: where stderr is no terminal
        with tqdm(total=steps, initial=progress.step, unit="step", disable=hidden) as bar:
            while progress.step < steps:
                try:
                    stopping = self.trainer.step(stop)
                except TrainingError as problem:
                    raise TrainingError(f"{problem}; {self._last_good()}") from None
                self._after_step(bar, stopping)
                if stopping:
                    break
        return progress.step < steps

    def _after_step(self, bar: Any, stopping: bool) -> None:
        trainer, step = self.trainer, self.trainer.progress.step
        last = step == trainer.cfg.train.steps
        logged = step % trainer.cfg.train.log_every == 0 or last
        if logged:
            self._log(bar)
        if step % trainer.cfg.train.save_every == 0 or last or stopping:
            started = time.perf_counter()
            self.save()
            self._timed_from += time.perf_counter() - started  # saving is not training
        bar.update()
        if self.on_step is not None:
            self.on_step(step, self.record if logged else None)

    def _log(self, bar: Any) -> None:
        record = self.trainer.metrics()
        seconds = time.perf_counter() - self._timed_from
        done, left = record["step"] - self._timed_step, self.trainer.cfg.train.steps - record["step"]
        record["images_per_s"] = done * self.trainer.global_batch / seconds
        record["eta_s"] = left * seconds / done
        self.record = record
        self._write(lambda: self._publish(record))
        self._restart_clock()
        if bar.disable:
            _say(one_line(record), self.is_main)
        else:
            bar.write(one_line(record), file=sys.stderr)

    def _publish(self, record: Mapping[str, float]) -> None:
        self.file.append(record)
        if self._trackers is not None:
            self._trackers.log(record)

    def save(self) -> Path:
        """Checkpoint now; every process learns whether it worked.

        Raises:
            OutputError: it could not be written; the one before is intact.
        """
        snapshot = self.trainer.snapshot(dict(self.record))
        snapshot = replace(snapshot, state={**snapshot.state, SAMPLES: len(self.trainer.dataset)})
        train = self.trainer.cfg.train

        def write() -> Path:
            folder = save_checkpoint(self.run_folder, snapshot, self.checkpoint)
            prune(self.run_folder, snapshot.step, train.keep_last, train.keep_every)
            return folder

        folder: Path = self._on_main(write)
        self.checkpoint = folder
        return folder

    def export(self, model: Any) -> Path:
        """Save the trained model in the run folder; every process learns whether it worked.

        Raises:
            OutputError: it could not be written; names the last good checkpoint.
        """
        folder = self.run_folder / MODEL_FOLDER
        self._write(lambda: export_model(model, folder, self.trainer.cfg.train.model_dtype))
        return folder

    def _snapshot_of(self, resume: str | None) -> Snapshot | None:
        """The checkpoint that ``resume`` means, once all processes have read the same one.

        Each looks for itself: nodes without a shared disk may hold different ones, or none.
        """
        snapshot: Snapshot | None = None
        problem: CheckpointError | OutputError | None = None
        seen = "none"
        try:
            self.checkpoint = self._folder.checkpoint_of(resume)
            if self.checkpoint is not None:
                snapshot, seen = load_checkpoint(self.checkpoint), identity(self.checkpoint)
        except (CheckpointError, OutputError) as error:
            problem, seen = error, f"none ({error})"
        counts = Counter(gather_object([seen]))
        if len(counts) > 1:
            found = ", ".join(f"{what} on {count}" for what, count in counts.items())
            raise CheckpointError(
                f"the {counts.total()} processes found different checkpoints in {self.run_folder}: {found}",
                expected="the same one on all",
                remedy="set output_dir to a disk that all nodes share, or copy the checkpoint to every node",
            )
        if problem is not None:
            raise problem
        return snapshot

    def _leave_behind(self, checkpoint: Path) -> None:
        """Drop what the run did after ``checkpoint``, which was asked for by its name."""
        if dropped := leave_behind(self.run_folder, checkpoint):
            steps = ", ".join(map(str, dropped))
            _say(f"deleted the checkpoints after it, which are left behind: step {steps}", self.is_main)

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on the main process, or its error, on every process."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [work()]
            except DyditError as problem:
                outcome = [problem]
        outcome = broadcast_object_list(outcome)
        if isinstance(outcome[0], DyditError):
            raise outcome[0]
        return outcome[0]

    def _write(self, work: Callable[[], Any]) -> None:
        """``_on_main``, whose error says where the run can go on."""
        try:
            self._on_main(work)
        except OutputError as problem:
            own = self.checkpoint is None or is_inside(self.checkpoint, self.run_folder / CHECKPOINTS)
            raise OutputError(
                f"{problem}; {self._last_good()}",
                remedy=f"continue with --resume {'auto' if own else self.checkpoint}",
            ) from problem

    def _restart_clock(self) -> None:
        self._timed_from, self._timed_step = time.perf_counter(), self.trainer.progress.step

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.checkpoint or 'none: nothing was saved before'}"


def export_model(model: Any, folder: Path, dtype: str = "float32") -> Path:
    """Save a model's weights and config alone, under a temporary name and then at ``folder``.

    The fixed position embedding is left out, as loading computes it: so a bfloat16 file is under half the
    size of the float32 weights in a checkpoint.

    Args:
        model: stays as it is.
        folder: what was there is replaced whole.
        dtype: number format of the file: ``float32`` or ``bfloat16``.

    Raises:
        OutputError: it cannot be written; what was there before is intact.
    """
    wanted = getattr(torch, dtype)
    if any(p.dtype != wanted for p in model.parameters()):
        model = converted_copy(model, wanted)
    with new_folder(folder) as scratch, computed_left_out(model):
        model.save_pretrained(scratch)
    return folder


def _say(text: str, is_main: bool) -> None:
    if is_main:
        print(text, file=sys.stderr, flush=True)
