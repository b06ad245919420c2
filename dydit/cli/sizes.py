"""Sizes on the command line."""

from __future__ import annotations

import re

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


_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**k for k, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**k for k, p in enumerate("KMGT", 1)}


def parse_bytes(option: str, text: str | None) -> int | None:
    """A size such as ``1.5GB``, ``800MiB`` or ``2000000`` in bytes; None where it was not given.

    Raises:
        ConfigError: it is no such size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not (size := _size(match)):
        raise ConfigError(f"{option} {text}", expected="a size such as 1.5GB, 800MiB or 2000000 (bytes)")
    return size


def _size(match: re.Match[str]) -> int:
    return int(float(match[1]) * _UNITS[match[2].upper()])
