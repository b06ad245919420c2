"""One process of a distributed run; ``test_training_distributed.py`` starts them, as a launcher would.

Usage: one_rank.py OUT CONFIG.yaml … Trains each configuration as DDP, then as FSDP, in one process group;
the first rank writes to ``OUT/NAME-{ddp,fsdp}.pt`` what the test compares, and a checkpoint after the third
step beside it, NAME being that of the configuration's file. Each then takes the fourth step once more from
that checkpoint, and FSDP also from DDP's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from dydit.config import RunConfig, load_config
from dydit.training import Trainer, make_dataset
from dydit.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from dydit.training.run import build_model

STEPS, CHECKPOINT_AT = 4, 3


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut up over the processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def observe(cfg: RunConfig, checkpoint: Path | None = None) -> dict[str, Any]:
    """A few steps: losses, the first step's gates and gradients, the last weights and averages."""
    trainer = make_trainer(cfg)
    gates, ratio = [], trainer.branches.ratio

    def watch(routing: Any) -> Tensor:
        gates.append([part.detach().clone() for part in (routing.heads, routing.groups, routing.tokens)])
        return ratio(routing)

    trainer.branches.ratio = watch  # type: ignore[method-assign]
    seen: dict[str, Any] = {"kind": str(trainer.accelerator.distributed_type), "records": []}
    for step in range(1, STEPS + 1):
        trainer.step()
        if step == 1:
            seen["gates"] = gather_object([gates[0]])
            grads = {n: whole(p.grad) for n, p in trainer.model.named_parameters() if p.grad is not None}
            seen["gradients"] = {name.removeprefix("module."): grad for name, grad in grads.items()}
        seen["records"].append(trainer.metrics())
        if checkpoint is not None and step == CHECKPOINT_AT:
            snapshot = trainer.snapshot()
            if trainer.accelerator.is_main_process:
                save_checkpoint(checkpoint, snapshot)
    trained = trainer.snapshot().tensors
    seen["weights"], seen["ema"], seen["optimizer"] = (trained[key] for key in ("model", "ema", "optimizer"))
    trainer.evaluated_ratio()  # a forward without backward: FSDP leaves some weights put together
    seen["closed"] = {name: tensor.clone() for name, tensor in trainer.close().state_dict().items()}
    return seen


def make_trainer(cfg: RunConfig) -> Trainer:
    """A trainer at its first step."""
    AcceleratorState._reset_state()
    set_seed(cfg.seed)  # the routers' first weights, the same on every process
    dataset = make_dataset(cfg.data)
    model, backbone = build_model(cfg, dataset.num_classes)
    return Trainer(model, cfg, dataset, backbone)


def resume(cfg: RunConfig, run: Path) -> dict[str, Any]:
    """The step after a run's checkpoint: its record, and the weights and averages after it."""
    trainer = make_trainer(cfg)
    torch.distributed.barrier()  # the first rank may still be writing
    checkpoint = find_checkpoint(run, "auto")
    assert checkpoint is not None
    trainer.load(load_checkpoint(checkpoint))
    trainer.step()
    record, snapshot = trainer.metrics(), trainer.snapshot()
    trainer.close()
    return {"record": record, **{key: snapshot.tensors[key] for key in ("model", "ema", "optimizer")}}


def main(out: Path, configs: list[Path]) -> None:
    for kind in ("ddp", "fsdp"):
        os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp").lower()
        for config in configs:
            name, cfg = f"{config.stem}-{kind}", load_config(config)
            seen = observe(cfg, out / name)
            seen["resumed"] = {kind: resume(cfg, out / name)}
            if kind == "fsdp":
                seen["resumed"]["ddp"] = resume(cfg, out / f"{config.stem}-ddp")
            if os.environ["RANK"] == "0":
                torch.save(seen, out / f"{name}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
