"""Peak memory of loading a checkpoint: python tools/measure_loading.py --preset DiT-XL/2

Writes a file of random weights of that size into a temporary folder, loads it in a fresh process and prints
one line of JSON: bytes of the weights, and what the peak of resident memory rose by. Linux only (it reads
/proc, which starts afresh with every process).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def peak_bytes() -> int:
    """Highest resident memory of this process so far, mapped files included."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(path: str) -> dict[str, float]:
    """Load ``path`` and report what it took; meaningful once per process."""
    from dydit.dynamic.loading import load_dydit
    from dydit.models.loading import load_backbone, stored_class

    load = load_dydit if stored_class(path) == "DyDiT" else load_backbone
    before, start = peak_bytes(), time.perf_counter()
    model = load(path)
    seconds, rise = time.perf_counter() - start, peak_bytes() - before
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {
        "weight_bytes": weights,
        "peak_rise_bytes": rise,
        "copies": round(rise / weights, 3),
        "imports_bytes": before,
        "seconds": round(seconds, 1),
    }


def write_random(preset: str, path: Path) -> None:
    """A public file of a published size with random weights."""
    import torch

    from dydit.models.dit import DiT

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT.from_preset(preset).state_dict().items()}
    torch.save({name: torch.empty(shape).uniform_(-0.03, 0.03) for name, shape in shapes.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="DiT-XL/2", help="size of the file that is made")
    parser.add_argument("--file", help="measure this file or folder, in this process, instead of making one")
    arguments = parser.parse_args()
    if arguments.file:
        print(json.dumps(measure(arguments.file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        write_random(arguments.preset, path)
        subprocess.run([sys.executable, __file__, "--file", str(path)], check=True)


if __name__ == "__main__":
    main()
