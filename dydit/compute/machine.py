"""The machine a figure was measured on."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
from pathlib import Path

import torch


def processor_name(device: torch.device | str = "cpu") -> str:
    """Name of the GPU, or of the CPU as the operating system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    named = [name for name in names if name and name != "unknown"]
    return named[0] if named else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the GPU by torch's allocator, or of this whole process on the CPU."""
    if device.type == "cuda":
        return _of_allocator("peak", device)
    # Of this program alone; getrusage also counts what its parent had when it was started.
    peak = _from_status("VmHWM")
    return _peak_by_rusage() if peak is None else peak


def held_memory(device: torch.device) -> int:
    """Bytes in use now; on a CPU whose system does not tell, the most so far."""
    if device.type == "cuda":
        return _of_allocator("current", device)
    held = _from_status("VmRSS")
    return _peak_by_rusage() if held is None else held


def reset_peak_memory(device: torch.device) -> None:
    """Let ``peak_memory`` start from what is in use now, where the system can do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(AttributeError):  # where the C library is not GNU's
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no longer in use
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak resident set


def _of_allocator(which: str, device: torch.device) -> int:
    """Bytes in torch's allocator, those among them that were dropped but wait for another stream."""
    return int(torch.cuda.memory_stats(device).get(f"active_bytes.all.{which}", 0))


def _from_status(field: str) -> int | None:
    """A size in bytes of this process as Linux tells it; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _peak_by_rusage() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
