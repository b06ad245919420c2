"""Sizes on the command line."""

from __future__ import annotations

from dydit.errors import ConfigError


def parse_sides(text: str | None) -> int | tuple[int, int] | None:
    """A --sample-size, ``32`` or ``32x64`` (height x width), as numbers; None where it was not given.

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"--sample-size {text}", expected="32, or 32x64 for height x width")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
