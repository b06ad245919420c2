"""The machine a figure was measured on."""

from __future__ import annotations

import platform
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
