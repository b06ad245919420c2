"""Which timesteps are timed, and in which order networks take their turns."""

from __future__ import annotations

from collections.abc import Sequence


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names, starting ``by`` places later: the order of a round."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def spread(timesteps: Sequence[float], count: int) -> tuple[float, ...]:
    """``count`` timesteps (or all there are) from the middle of as many equal parts."""
    count = min(count, len(timesteps))
    return tuple(timesteps[(2 * i + 1) * len(timesteps) // (2 * count)] for i in range(count))
