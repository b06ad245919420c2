"""Compute: analytic and counted MACs, measured time."""
