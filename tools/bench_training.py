"""Cost of a training step of the dynamic model against the static one, and what gradient checkpointing saves.

    python tools/bench_training.py                               # DiT-B/2, batch 8; memory at batch 16
    python tools/bench_training.py --preset DiT-S/8 --rounds 3 --memory-batch 4 --out runs/try

Whole steps are measured (draws, forward, backward, clipping, AdamW, EMA), all variants taking turns in one
process, and compared within each round. Memory is the peak of a process of its own per variant. Writes
``OUT/benchmarks_training.json`` and ``OUT/benchmarks_training.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dydit.compute.latency import Spread, measure_interleaved
from dydit.compute.machine import peak_memory, processor_name
from dydit.config import DyDiTConfig, RunConfig, WarmupConfig
from dydit.dynamic.convert import convert
from dydit.files import write_file
from dydit.models.dit import DiT
from dydit.training.branches import Branches
from dydit.training.memory import MIB
from dydit.training.trainer import Trainer

NUM_CLASSES = 1000
# Variant -> the warm-up of a dynamic step; the static step has none.
WARMUPS = {
    "dynamic": WarmupConfig(mode="none"),
    "dynamic, complete model on 1/4 of the batch": WarmupConfig(mode="complete", steps=10**9, fraction=0.25),
    "dynamic, complete model on the whole batch": WarmupConfig(mode="complete", steps=10**9),
}
# What the project promises.
LIMITS = {"dynamic": 1.06, "dynamic, complete model on 1/4 of the batch": 1.35}
MEMORY_LIMIT = 0.60


class Noise:
    """Random latents: a step costs the same on any."""

    num_classes = NUM_CLASSES

    def __init__(self, channels: int, side: int) -> None:
        self.sample_shape = (channels, side, side)
        self.images = torch.randn(64, *self.sample_shape).clamp(-1, 1)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % NUM_CLASSES


def make_trainer(
    options: argparse.Namespace, dynamic: bool, batch: int, checkpointing: bool = False
) -> Trainer:
    """A trainer of a fresh static or dynamic model, its routers near even odds as in the middle of a run."""
    common: dict[str, Any] = {
        "output_dir": "unused",
        "data": {"batch_size": batch},
        "train": {"steps": 10**9, "clip_norm": 200.0, "gradient_checkpointing": checkpointing},
        "warmup": {"mode": "none"},
    }
    torch.manual_seed(0)
    backbone = DiT.from_preset(options.preset, sample_size=options.sample_size, num_classes=NUM_CLASSES)
    data = Noise(backbone.shape.in_channels, options.sample_size)
    if not dynamic:
        model = {"preset": options.preset, "sample_size": options.sample_size}
        return Trainer(backbone, RunConfig(task="pretrain", model=model, **common), data)
    routing = DyDiTConfig(open_bias=0.0, token_open_bias=0.0)
    cfg = RunConfig(task="finetune", backbone="unused", dydit=routing, **common)
    return Trainer(convert(backbone, routing, copy=False), cfg, data)


def steps(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """One training step of each variant, to be called again and again."""
    static, dynamic = (make_trainer(options, dynamic=flag, batch=options.batch) for flag in (False, True))

    def variant(warmup: WarmupConfig) -> Callable[[], object]:
        cfg = dynamic.cfg.model_copy(update={"warmup": warmup})
        branches = Branches(dynamic.accelerator, dynamic.model, dynamic.plain, None, cfg)

        def step() -> None:
            dynamic.branches = branches
            dynamic.step()

        return step

    return {"static": static.step, **{name: variant(warmup) for name, warmup in WARMUPS.items()}}


def peak_of_one_run(options: argparse.Namespace, checkpointing: bool) -> dict[str, float]:
    """Peak memory of two steps of the dynamic model, in a process of its own, in MiB."""
    words = [sys.executable, __file__, "--preset", options.preset, "--sample-size", str(options.sample_size)]
    words += ["--threads", str(options.threads), "--memory-batch", str(options.memory_batch)]
    words += ["--memory-of", "checkpointing" if checkpointing else "plain"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])


def tell_peak(options: argparse.Namespace) -> None:
    """The inside of ``peak_of_one_run``."""
    trainer = make_trainer(options, True, options.memory_batch, options.memory_of == "checkpointing")
    before = peak_memory(trainer.accelerator.device)
    for _ in range(2):  # the first one makes the moments
        trainer.step()
    peak = peak_memory(trainer.accelerator.device)
    print(json.dumps({"before_mib": before / MIB, "peak_mib": peak / MIB}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, with their conditions."""
    times = measure_interleaved(steps(options), rounds=options.rounds, warmup=options.warmup)
    static = torch.tensor(times["static"])
    ratios = {name: Spread.of(torch.tensor(ms) / static) for name, ms in times.items() if name != "static"}
    memory: dict[str, Any] = {}
    if options.memory_batch:
        plain, saving = (peak_of_one_run(options, flag) for flag in (False, True))
        memory = {"plain": plain, "checkpointing": saving, "ratio": saving["peak_mib"] / plain["peak_mib"]}
    return {
        "preset": options.preset, "sample_size": options.sample_size, "batch": options.batch,
        "memory_batch": options.memory_batch, "rounds": options.rounds, "threads": options.threads,
        "device": processor_name("cuda" if torch.cuda.is_available() else "cpu"), "torch": torch.__version__,
        "ms": {name: vars(Spread.of(values)) for name, values in times.items()},
        "ratio_to_static": {name: vars(spread) for name, spread in ratios.items()},
        "memory": memory, "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip


def verdict(measured: float, limit: float) -> str:
    """Whether a promise is kept."""
    return "met" if measured <= limit else "missed"


def page(found: dict[str, Any]) -> str:
    """The figures as a page."""
    lines = [
        "# Training: what a step costs", "",
        f"`{found['command']}`", "",
        f"{found['preset']}, input of side {found['sample_size']}, batch {found['batch']}, fp32, "
        f"{found['device']}, {found['threads']} threads, torch {found['torch']}. Whole training steps; "
        f"{found['rounds']} rounds in turns; ratios within a round: median (quartiles).", "",
        "| step | ms | × static | promised |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, ms in found["ms"].items():
        ratio, limit = found["ratio_to_static"].get(name), LIMITS.get(name)
        told = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "1"
        promised = f"≤ {limit}: {verdict(ratio['median'], limit)}" if limit else "-"
        lines.append(f"| {name} | {ms['median']:.0f} | {told} | {promised} |")
    if found["memory"]:
        plain, saving = found["memory"]["plain"], found["memory"]["checkpointing"]
        lines += [
            "", f"Peak memory of the process, dynamic model, batch {found['memory_batch']}:", "",
            "| gradient checkpointing | peak MiB | of it before the first step |", "|---|---|---|",
            f"| off | {plain['peak_mib']:.0f} | {plain['before_mib']:.0f} |",
            f"| on | {saving['peak_mib']:.0f} | {saving['before_mib']:.0f} |", "",
            f"On is {found['memory']['ratio']:.1%} of off; promised: at most {MEMORY_LIMIT:.0%}: "
            f"{verdict(found['memory']['ratio'], MEMORY_LIMIT)}.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="DiT-B/2")
    parser.add_argument("--sample-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory-batch", type=int, default=16, help="0: leave memory out")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--memory-of", choices=["plain", "checkpointing"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        tell_peak(options)
        return
    found = measure(options)
    write_file(
        options.out / "benchmarks_training.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    )
    write_file(options.out / "benchmarks_training.md", page(found))
    print(page(found))


if __name__ == "__main__":
    main()
