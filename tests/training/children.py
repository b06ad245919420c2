"""Runs in processes of their own, to kill."""

from __future__ import annotations

import os

from dydit.config import RunConfig
from dydit.training import run_training


def train_in_child(cfg: RunConfig) -> int:
    """Process id of a child that trains, in silence; forked, so that nothing is imported again."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run_training(cfg)
        finally:
            os._exit(0)
    return child
