"""TensorBoard and W&B beside the JSON lines, through accelerate's trackers, where they are installed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from dydit.config import RunConfig
from dydit.errors import ConfigError, OutputError
from dydit.files import write_file

# Tracker -> modules of which one must be there.
NEEDED = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
WANDB_ID = "wandb_id"


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ConfigError: names the first one that is missing.
    """
    for name in names:
        if not any(find_spec(module) for module in NEEDED[name]):
            raise ConfigError(
                f"train.trackers has {name}, which is not installed",
                remedy=f"pip install {name}, or remove it: metrics.jsonl is always written",
            )


class Trackers:
    """The trackers of a run, in its main process.

    Args:
        cfg: the run; its settings become the tracker's.

    Raises:
        OutputError: from every method, when a tracker cannot write, or refuses.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.trackers: dict[str, GeneralTracker] = {}
        run = Path(cfg.output_dir)
        settings = flat_settings(cfg.model_dump(mode="json"))
        for name in cfg.train.trackers:
            tracker: Any
            with _output_errors(name):
                if name == "tensorboard":
                    tracker = TensorBoardTracker("tensorboard", logging_dir=run)
                else:
                    # One run of theirs for one of ours: resuming goes on in it.
                    mine = {"name": run.name, "dir": str(run), "id": wandb_id(run)}
                    tracker = WandBTracker("dydit", resume="allow", **mine)
                tracker.start()
                tracker.store_init_configuration(settings)
            self.trackers[name] = tracker

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record; values that are not finite are left out."""
        values = {name: value for name, value in record.items() if name != "step" and math.isfinite(value)}
        for name, tracker in self.trackers.items():
            with _output_errors(name):
                tracker.log(values, step=int(record["step"]))

    def finish(self) -> None:
        """Flush and close."""
        for name, tracker in self.trackers.items():
            with _output_errors(name):
                tracker.finish()


@contextmanager
def _output_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except Exception as problem:  # W&B has errors of its own: no login, no network
        remedy = "free space" if isinstance(problem, OSError) else "put that right"
        raise OutputError(
            f"tracker {name} cannot write: {getattr(problem, 'strerror', None) or problem}",
            remedy=f"{remedy}, or remove it from train.trackers",
        ) from problem


def wandb_id(run: Path) -> str:
    """W&B's id for a run folder, drawn once and kept in it: folders of one name are different runs.

    Raises:
        OutputError: it cannot be written.
    """
    file = run / WANDB_ID
    if not file.exists():
        write_file(file, secrets.token_hex(8) + "\n")  # of the system: no generator of the run moves
    return file.read_text(encoding="utf-8").strip()


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> number, text or bool; lists and empty values as text, since trackers know no others."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str)) else str(value)
    return flat
