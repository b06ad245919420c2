"""``dydit pretrain``: a static backbone from scratch."""

from __future__ import annotations

from dydit.cli.training import Config, DryRun, Overrides, Resume, train


def pretrain(
    config: Config, overrides: Overrides = None, resume: Resume = None, dry_run: DryRun = False
) -> None:
    """Train a static model from scratch."""
    train("pretrain", config, overrides or [], resume, dry_run)
