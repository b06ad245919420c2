"""What ``pretrain`` and ``finetune`` share: their arguments, and the call of the one trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dydit.errors import ConfigError

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, with dotted keys: train.lr=2e-5."),
]
Resume = Annotated[
    str | None,
    typer.Option(metavar="auto|PATH", help="Go on from the newest intact checkpoint, or from this one."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and try one step; write nothing.")]


def train(task: str, config: Path, overrides: list[str], resume: str | None, dry_run: bool) -> None:
    """Load the configuration, make sure that it is for ``task``, and run it.

    Raises:
        ConfigError: for a mistake in the configuration, or one that is for the other verb.
    """
    from dydit.config import load_config

    settings = load_config(config, overrides)
    if settings.task != task:
        raise ConfigError(
            f"{config} has task {settings.task}",
            expected=f"task {task} for this verb",
            remedy=f"run `dydit {settings.task} {config}`",
        )
    from dydit.training import run_training

    result = run_training(settings, resume, dry_run)
    if result.stopped:
        return  # asked to stop, and did: the trainer has said where, and how to go on
    if result.model_dir is not None and os.environ.get("RANK", "0") == "0":
        typer.echo(f"{settings.output_dir}: {result.steps} steps; model in {result.model_dir}")
