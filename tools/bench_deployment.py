"""Time of a deployment folder's calls beside the engine's and the static backbone's, and that they agree.

    python tools/bench_deployment.py                      # DiT-XL/2, float32, batch 2
    python tools/bench_deployment.py --aot-compile        # the programs compiled by AOTInductor besides

Weights are random, routers as ``dydit bench`` makes them (half the compute). The folder is written as
``dydit export --aot`` does and run by its loader; all take turns in one process, at three timesteps, slices
made before. Ratios are of the same round: median and quartiles.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dydit.benchmark.measure import CALL_TIMESTEPS, time_calls
from dydit.benchmark.order import spread
from dydit.benchmark.settings import BenchSettings, plan_cases
from dydit.benchmark.subject import make_subject, preset_depth
from dydit.benchmark.variants import dense, make_engine
from dydit.compute.latency import paired_speedup
from dydit.deployment.folder import compile_programs, write_deployment
from dydit.deployment.loader import Deployment
from dydit.evaluation.calls import Call, largest_difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="DiT-XL/2")
    parser.add_argument("--depth", type=int, help="blocks; default: the preset's")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="fp32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--aot-compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = BenchSettings(
        subject=options.preset,
        dtypes=(options.dtype,),
        depth=options.depth,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    (case,) = plan_cases(settings, preset_depth(settings))
    subject = make_subject(settings, case)
    x, y = subject.noise_call(options.batch)
    timesteps = spread(subject.schedule.timesteps, CALL_TIMESTEPS)
    networks: dict[str, Callable[..., Any]] = {
        "static": dense(subject.static, compiled=False),
        "engine": make_engine(subject, settings, "capacity"),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = write_deployment(folder, subject.model, subject.schedule)
        networks["deployment"] = Deployment(folder)
        if options.aot_compile:
            compile_programs(folder, programs, progress=True)
            networks["compiled deployment"] = Deployment(folder, compiled=True)
    (rounds,) = time_calls(
        [(networks, dict.fromkeys(timesteps, (x, y)))],
        options.rounds,
        warmup=1,
        title=f"{options.dtype}, batch {options.batch}",
    )
    calls = [Call(x, t, y) for t in timesteps]
    static = [found.ms["static"] for found in rounds]
    for label, network in list(networks.items())[1:]:
        speed = paired_speedup(static, [found.ms[label] for found in rounds])
        error = largest_difference(network, networks["engine"], calls)
        print(
            f"{label}: {speed.median:.2f} times as fast as static ({speed.low:.2f} to {speed.high:.2f}); "
            f"relative difference to the engine {error:.1e}"
        )


if __name__ == "__main__":
    main()
