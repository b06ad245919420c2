"""Peak memory of one network: measured in a process that holds nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dydit.benchmark.results import STATIC, Memory
from dydit.benchmark.settings import BenchSettings, CaseSettings
from dydit.benchmark.subject import Subject, bare_model, given_texts
from dydit.benchmark.variants import dense, make_engine
from dydit.compute.machine import held_memory, peak_memory, reset_peak_memory
from dydit.config import SamplerConfig
from dydit.errors import DyditError
from dydit.export.schedule import SubnetSchedule
from dydit.guidance import Denoiser, for_run
from dydit.runtime.packing import block_bytes

ROUTERS = "routers.safetensors"


def measure_memory(subject: Subject, settings: BenchSettings, case: CaseSettings) -> dict[int, Memory]:
    """Batch -> peak memory of the static backbone and of each mode of the engine, never compiled.

    Each network gets a process that makes or loads the model by itself, and takes the routers and the
    schedule of ``subject``; it runs the batches in rising order. Engines run every timestep of the schedule,
    as one run: memory grows with the largest masks, and with the sizes that were not met before.

    Raises:
        DyditError: a process failed.
    """
    peaks: dict[str, dict[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        subject.schedule.save(folder)
        routers = {
            name: p.contiguous().cpu() for name, p in subject.model.dynamic_blocks.state_dict().items()
        }
        save_file(routers, Path(folder) / ROUTERS)
        for name in tqdm((STATIC, *settings.modes), desc=f"memory, {case.dtype}", unit="network"):
            peaks[name] = _in_a_process(name, folder, subject, settings, case)
    budget = settings.memory_budget or _default_budget(subject)
    return {
        batch: Memory(peaks={name: found[batch] for name, found in peaks.items()}, budget=budget)
        for batch in case.batches
    }


def _default_budget(subject: Subject) -> int:
    adapter, backbone = subject.model.adapter, subject.model.backbone
    return sum(block_bytes(adapter.attention(b), adapter.mlp(b)) for b in adapter.blocks(backbone))


def _in_a_process(
    name: str, folder: str, subject: Subject, settings: BenchSettings, case: CaseSettings
) -> dict[int, int]:
    order = {
        "network": name,
        "folder": folder,
        "settings": settings.model_dump(mode="json"),
        "case": case.model_dump(mode="json"),
        "sampler": subject.settings.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(order), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DyditError(
            f"the process that measures the memory of {name} ended with status {done.returncode}: {last}",
            remedy="free memory, or leave it out with --no-memory",
        )
    return {int(batch): size for batch, size in json.loads(done.stdout.splitlines()[-1]).items()}


def peaks_of(order: dict[str, Any]) -> dict[int, int]:
    """What the process does: batch -> peak bytes above those before there was a model."""
    torch.set_num_threads(order["threads"])
    settings = BenchSettings(**order["settings"]).model_copy(update={"compile": False})
    device, case = torch.device(settings.device), CaseSettings(**order["case"])
    before = held_memory(device)
    network, timesteps, inputs = _network(order, settings, case)
    reset_peak_memory(device)  # reading a file may take more than what is kept of it
    found: dict[int, int] = {}
    for batch, (x, y) in inputs.items():
        run = for_run(network, timesteps, y)  # as samplers do: it holds more
        for t in timesteps:
            run(x, t, y)
        found[batch] = peak_memory(device) - before
    return found


def _network(
    order: dict[str, Any], settings: BenchSettings, case: CaseSettings
) -> tuple[Denoiser, Sequence[float], dict[int, tuple[Tensor, Tensor]]]:
    """The network, without what it does not need; timesteps, and the inputs of all for every batch size."""
    folder = Path(order["folder"])
    model, plan = bare_model(settings, case), SubnetSchedule.load(folder)
    model.dynamic_blocks.load_state_dict(load_file(folder / ROUTERS))
    # Noise at every timestep, also for a trained model: how many tokens it keeps moves the peak by little.
    sampler, texts = SamplerConfig(**order["sampler"]), given_texts(settings)
    subject = Subject(model, plan, sampler, synthetic=True, seed=settings.seed, texts=texts)
    name = order["network"]
    network = dense(subject.static, False) if name == STATIC else make_engine(subject, settings, name)
    timesteps = plan.timesteps[:2] if name == STATIC else plan.timesteps  # a static call is like another
    return network, timesteps, {batch: subject.noise_call(batch) for batch in case.batches}


def main() -> None:
    """Read an order from standard input and print the answer as the last line."""
    print(json.dumps(peaks_of(json.loads(sys.stdin.read()))))


if __name__ == "__main__":
    main()
