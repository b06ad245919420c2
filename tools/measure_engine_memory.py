"""How the memory of a sampling engine grows on the CPU, and how long a pass over the schedule takes.

    python tools/measure_engine_memory.py                # DiT-XL/2 cut to 8 blocks, bfloat16, batch 8
    python tools/measure_engine_memory.py --sizes any    # the MLP on exactly the kept tokens
    python tools/measure_engine_memory.py --one-kernel   # fc1, bias and GELU in one oneDNN kernel on any CPU

Each pass calls every timestep of a 50-step schedule on fresh noise, so the number of kept tokens is another
one in every call. Memory is the process's resident set above the moment before the first pass.
"""

from __future__ import annotations

import argparse
import time

import torch

from dydit.benchmark.settings import BenchSettings, CaseSettings
from dydit.benchmark.subject import make_subject
from dydit.benchmark.variants import dense, make_engine
from dydit.compute.machine import held_memory
from dydit.precision import DTYPES
from dydit.runtime import layers, on_cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="DiT-XL/2")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mode", choices=["exact", "capacity"], default="exact")
    parser.add_argument("--sizes", choices=["few", "any"], default="few")
    parser.add_argument("--one-kernel", action="store_true")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.sizes == "any":
        on_cpu.filled_up = lambda count: count
    if options.one_kernel:
        layers.ACTIVATED_IN_ONE_KERNEL = frozenset({DTYPES[options.dtype]})
    settings = BenchSettings(subject=options.preset, dtypes=(options.dtype,), depth=options.depth)
    case = CaseSettings(dtype=options.dtype, batches=(1,), depth=options.depth, sample_size=32)
    subject = make_subject(settings, case)
    engine, (x, y) = make_engine(subject, settings, options.mode), subject.noise_call(options.batch)
    dense(subject.static, compiled=False)(x, 500.0, y)
    before = held_memory(x.device)
    for index in range(options.passes):
        start = time.perf_counter()
        for t in subject.schedule.timesteps:
            engine(torch.randn_like(x), t, y)
        seconds, grown = time.perf_counter() - start, (held_memory(x.device) - before) / 1e6
        print(
            f"pass {index + 1}: {seconds:.1f} s, {grown:.0f} MB more than before, "
            f"{engine.pack_statistics().bytes / 1e6:.0f} MB of them slices"
        )


if __name__ == "__main__":
    main()
