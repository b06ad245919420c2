"""Seconds that an export takes besides loading the model.

    python tools/measure_export.py                      # DiT-XL/2, 250 timesteps of DDPM
    python tools/measure_export.py --order              # heads and groups ordered by use besides
    python tools/measure_export.py --rounds 1 --aot     # then the size of a deployment folder

What ``dydit export`` does with a model that is in memory: the width routers at every timestep, the distinct
masks, MACs, the sha256 of the weights, and the folder written. Weights are random.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dydit.config import DyDiTConfig, SamplerConfig
from dydit.deployment.folder import bytes_of, weight_bytes, write_deployment
from dydit.diffusion import make_sampler
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.export.ordering import order_by_use
from dydit.export.schedule import SubnetSchedule
from dydit.models.dit import DiT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="DiT-XL/2")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--order", action="store_true")
    parser.add_argument("--aot", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = convert(DiT.from_preset(options.preset), DyDiTConfig(open_bias=0.0, token_open_bias=0.0))
    with torch.no_grad():
        for parameter in model.router_parameters():  # fresh ones decide the same at every timestep
            parameter.normal_(std=0.1)
    settings = SamplerConfig(name="ddpm", steps=options.steps)
    timesteps = make_sampler(settings, model.shape.learn_sigma).timesteps
    taken = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            if options.order:
                order_by_use(model, SubnetSchedule.from_model(model, timesteps, weights=""))
            schedule = SubnetSchedule.from_model(model, timesteps, settings.model_dump())
            schedule.save(folder)
            taken.append(time.perf_counter() - start)
    low, median, high = np.quantile(taken, [0.25, 0.5, 0.75])
    print(
        f"{options.preset}, {len(schedule.timesteps)} timesteps, {len(schedule.head_rows)} distinct "
        f"pairs of head and group masks: {median:.1f} s ({low:.1f} to {high:.1f})"
    )
    if options.aot:
        print(deployed(model, schedule))


def deployed(model: DyDiT, schedule: SubnetSchedule) -> str:
    """How large a deployment folder is, and what is in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = write_deployment(folder, model, schedule).programs
        size = sum(path.stat().st_size for path in folder.rglob("*.pt2"))
        share = bytes_of(folder) / weight_bytes(model)
    return (
        f"deployment: {len(programs)} programs of {size / 1e3:.0f} kB; "
        f"the folder is {share:.4f} times the weights"
    )


if __name__ == "__main__":
    main()
