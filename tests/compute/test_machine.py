"""Peak memory of a process on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch

from dydit.compute.machine import held_memory, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_what_was_freed_before_a_reset_is_no_part_of_the_peak() -> None:
    """Also below what is still in use, where the C library would keep it."""
    small = [bytes(50_000) + b"1" for _ in range(2_000)]
    full = held_memory(CPU)
    del small[:-1]
    reset_peak_memory(CPU)
    left = peak_memory(CPU)  # what other tests of this process had freed is not part of it either
    assert left < full - 50_000_000
    large = torch.ones(20_000_000)
    assert peak_memory(CPU) > held_memory(CPU) - 10_000_000 > left + 50_000_000
    del large
