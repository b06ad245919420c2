"""``dydit finetune``: a pretrained backbone made dynamic."""

from __future__ import annotations

from dydit.cli.training import Config, DryRun, Overrides, Resume, train


def finetune(
    config: Config, overrides: Overrides = None, resume: Resume = None, dry_run: DryRun = False
) -> None:
    """Make a pretrained model dynamic and fine-tune it."""
    train("finetune", config, overrides or [], resume, dry_run)
