"""The run folder: what lies in it, who may write to it, and what a new run must not replace."""

from __future__ import annotations

import logging
from pathlib import Path

from filelock import FileLock, Timeout

from dydit.config import dump_config, load_config
from dydit.errors import ConfigError, OutputError
from dydit.files import check_writable
from dydit.training.checkpoint import CHECKPOINTS, find_checkpoint, list_checkpoints

CONFIG_FILE = "config.yaml"
MODEL_FOLDER = "model"
LOCK = ".lock"
_WAIT_S = 5.0  # as long as the loaders of a killed run may take to notice, which hold its lock

log = logging.getLogger(__name__)


class RunFolder:
    """A run's folder, held by one process at a time: of two, each would delete the other's work.

    Args:
        path: of the folder; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK)

    def hold_if_there(self) -> None:
        """``hold``, where a run has begun: one that is refused leaves nothing in other folders."""
        if (self.path / CHECKPOINTS).is_dir():
            self.hold()

    def hold(self) -> None:
        """Make the folder, and keep other runs out of it until ``release``, or until the process ends.

        Some file systems of clusters know no locks: there it is left to the user, who is told.

        Raises:
            OutputError: it cannot be written, or another process holds it.
        """
        if self._lock.is_locked:
            return
        check_writable(self.path / CHECKPOINTS)
        try:
            self._lock.acquire(timeout=_WAIT_S)
        except Timeout:
            raise OutputError(
                f"another process trains in {self.path}",
                expected="one at a time",
                remedy="wait for it, stop it, or set another output_dir",
            ) from None
        except (OSError, NotImplementedError) as problem:  # by version of filelock
            log.warning(
                "%s cannot be locked (%s): make sure that one run at a time is in it", self.path, problem
            )

    def release(self) -> None:
        """Let others in; nothing where it is not held."""
        self._lock.release()

    def checkpoint_of(self, resume: str | None) -> Path | None:
        """The checkpoint that ``resume`` means here, see ``find_checkpoint``; None to start.

        Raises:
            CheckpointError: there is none to be had.
            OutputError: the folder holds a run, a trained model, or a configuration that no run wrote, which
                this one would replace.
        """
        there = list_checkpoints(self.path)
        checkpoint = None if resume is None else find_checkpoint(self.path, resume)
        if is_inside(checkpoint, self.path / CHECKPOINTS):
            return checkpoint
        if there:
            raise OutputError(
                f"{self.path} holds a run already, up to step {list(there)[-1]}",
                remedy="continue it with --resume auto, or set another output_dir",
            )
        replaced = [MODEL_FOLDER] if self._config_is_of_a_run() else [MODEL_FOLDER, CONFIG_FILE]
        name = next((name for name in replaced if (self.path / name).exists()), None)
        if name is not None:
            raise OutputError(
                f"{self.path} holds {name}, which the run would replace",
                expected="a new folder",
                remedy="set another output_dir, or move it away",
            )
        return checkpoint

    def _config_is_of_a_run(self) -> bool:
        """Whether it is as runs write it, all defaults included: one left it that came to no checkpoint."""
        file = self.path / CONFIG_FILE
        try:
            return file.read_text(encoding="utf-8") == dump_config(load_config(file))
        except (OSError, UnicodeDecodeError, ConfigError):
            return False


def is_inside(path: Path | None, folder: Path) -> bool:
    """Whether ``folder`` holds ``path``, directly."""
    return path is not None and path.resolve().parent == folder.resolve()
