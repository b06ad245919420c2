"""What ``on_bad`` does about data that cannot be used: raise, or skip and say so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

OnBad = Literal["raise", "skip"]

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
