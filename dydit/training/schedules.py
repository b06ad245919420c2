"""Settings that change during a run, as pure functions of the step: nothing to save, exact on resume."""

from __future__ import annotations

from dydit.config import GatesConfig


def gate_temperature(gates: GatesConfig, start: float, step: int) -> float:
    """Temperature of the Gumbel-sigmoid at ``step``: from ``start`` geometrically to ``final_temperature``.

    Args:
        gates: when it changes, and to what.
        start: ``dydit.temperature``.
        step: optimiser steps done.
    """
    if gates.final_temperature is None:
        return start
    progress = _rise(step, gates.anneal_start, gates.anneal_steps)
    return float(start * (gates.final_temperature / start) ** progress)


def decisiveness_weight(gates: GatesConfig, step: int) -> float:
    """Weight of the decisiveness term at ``step``; 0 before its first one."""
    if step < gates.decisiveness_start:
        return 0.0
    return gates.decisiveness * _rise(step + 1, gates.decisiveness_start, gates.decisiveness_ramp)


def _rise(step: int, start: int, steps: int) -> float:
    """0 up to ``start``, 1 from ``start + steps`` on, linear between."""
    if step < start:
        return 0.0
    return 1.0 if steps == 0 else min(1.0, (step - start) / steps)
