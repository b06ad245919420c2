"""Errors a user can put right: each message says what was seen, what was expected and what to do."""

from __future__ import annotations


class DyditError(ValueError):
    """A user's mistake or a broken input, told in one line.

    Args:
        seen: what was found, with names and numbers.
        expected: what would have been accepted; empty where ``seen`` says it all.
        remedy: what to do next, as an imperative.
    """

    def __init__(self, seen: str, *, expected: str = "", remedy: str = "") -> None:
        parts = [seen]
        if expected:
            parts.append(f"expected {expected}")
        if remedy:
            parts.append(remedy)
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


class ConfigError(DyditError):
    """A setting that is unknown, of the wrong type or out of range."""


class CheckpointError(DyditError):
    """A weights file or folder that is missing, truncated, foreign or of another shape."""


class ShapeError(DyditError):
    """A tensor or a model dimension that does not fit."""


class ScheduleError(DyditError):
    """A schedule that is broken, lacks a timestep or belongs to other weights."""


class DataError(DyditError):
    """An image, label or data set that cannot be used."""


class OutputError(DyditError):
    """A place that results cannot be written to."""


class TrainingError(DyditError):
    """A training run that cannot start or go on."""
