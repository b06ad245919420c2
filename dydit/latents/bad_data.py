"""What ``on_bad`` does about data that cannot be used: raise, or skip and say so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

OnBad = Literal["raise", "skip"]
# Labels must be below it: on_class_mismatch=drop makes a table for the largest, so a stray one could fill the
# memory. The published sets of images with the most classes have some 200,000.
LABEL_LIMIT = 1_000_000

log = logging.getLogger(__name__)


def log_skipped(path: str | Path, problems: Sequence[str]) -> None:
    """Warn of everything that ``skip`` left out of a data set, and how much that is.

    Args:
        path: of the data set.
        problems: what was left out and why; names the file.
    """
    if problems:
        log.warning("%s: %d skipped (data.on_bad=skip), the first: %s", path, len(problems), problems[0])
    for problem in problems[1:]:
        log.warning("skipped: %s", problem)
