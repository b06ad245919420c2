"""Scale-out is the same maths: two processes with eight samples each against one process with sixteen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import one_rank  # beside this file: pytest puts the folder on the path
import pytest
import torch

from dydit.config import RunConfig, dump_config
from dydit.training import Trainer, make_dataset
from dydit.training.checkpoint import find_checkpoint, load_checkpoint
from dydit.training.run import build_model

TIMEOUT_S = 300
# A gradient that is zero in theory (the keys' bias) is rounding noise, which Adam turns into whole steps.
ADAM_NOISE = 2e-4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def launch(script: Path, arguments: list[str]) -> None:
    """Two processes on the CPU, with what torchrun and accelerate's launcher would tell them."""
    shared = {
        **os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "FSDP_VERSION": "2",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


# Warm-up on all of the batch, on a part that two processes cannot share evenly (5 of 16), and by a teacher.
WARMUPS: dict[str, dict[str, Any]] = {
    "whole": {"mode": "complete", "fraction": 1.0},
    "part": {"mode": "complete", "fraction": 0.3},
    "distill": {"mode": "distill", "fraction": 0.3, "feature_weight": 0.5},
}
KINDS = [(name, kind) for name in WARMUPS for kind in ("ddp", "fsdp")]


def settings(
    make: Callable[..., RunConfig], batch_size: int, warmup: str = "whole", **train: Any
) -> RunConfig:
    return make(
        f"{warmup}{batch_size}",
        data={"batch_size": batch_size, "flip": True},
        train={"steps": 10, "clip_norm": None, **train},
        warmup={"steps": 2, **WARMUPS[warmup]},
        gates={"decisiveness": 0.1, "final_temperature": 0.5, "anneal_steps": 4},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path) -> dict[Any, dict[str, Any]]:
    """What ``one_rank.observe`` saw of one process with 16 samples, of DDP and of FSDP with 2 × 8."""
    out = tmp_path_factory.mktemp("distributed")
    make = configs(backbone_folder, out)
    cases = {name: settings(make, 8, name) for name in WARMUPS}
    cases["bf16"] = settings(make, 8, mixed_precision="bf16")
    cases["compute"] = settings(make, 8, diffusion_weight=0.0)
    for name, cfg in cases.items():
        (out / f"{name}.yaml").write_text(dump_config(cfg))
    launch(Path(one_rank.__file__), [str(out), *(str(out / f"{name}.yaml") for name in cases)])
    found: dict[Any, dict[str, Any]] = {
        (name, kind): torch.load(out / f"{name}-{kind}.pt", weights_only=False)
        for name in cases
        for kind in ("ddp", "fsdp")
    }
    alone = {name: one_rank.observe(settings(make, 16, name)) for name in WARMUPS}
    return {**alone, **found, "out": {"path": out}}


def configs(backbone: Path, out: Path) -> Callable[..., RunConfig]:
    def make(name: str, **sections: Any) -> RunConfig:
        base = {
            "task": "finetune", "output_dir": str(out / name), "backbone": str(backbone),
            "dydit": {"open_bias": 1.0, "token_open_bias": 1.0, "temperature": 1.0},
            "compute": {"target": 0.6, "ramp_steps": 4},
        }  # fmt: skip
        return RunConfig(**base, **sections)

    return make


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_processes_run_as_what_was_asked_for(
    runs: dict[Any, dict[str, Any]], name: str, kind: str
) -> None:
    assert (
        runs[name, kind]["kind"] == {"ddp": "DistributedType.MULTI_CPU", "fsdp": "DistributedType.FSDP"}[kind]
    )


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_process_routes_its_samples_as_one_process_would(
    runs: dict[Any, dict[str, Any]], name: str, kind: str
) -> None:
    (one,), parts = runs[name]["gates"], runs[name, kind]["gates"]
    assert len(parts) == 2
    for whole, *pieces in zip(one, *parts, strict=True):
        assert 0.1 < whole.mean() < 0.95  # there is something to compare
        for rank, piece in enumerate(pieces):
            assert torch.equal(piece, whole[rank::2])


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_gradients_are_those_of_one_process_with_both_batches(
    runs: dict[Any, dict[str, Any]], name: str, kind: str
) -> None:
    one, two = runs[name]["gradients"], runs[name, kind]["gradients"]
    assert one.keys() == two.keys() and any("router" in key for key in one)
    for key, gradient in one.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_loss_series_is_the_same_compute_loss_included(
    runs: dict[Any, dict[str, Any]], name: str, kind: str
) -> None:
    for step, (one, two) in enumerate(zip(runs[name]["records"], runs[name, kind]["records"], strict=True)):
        assert one.keys() == two.keys() and {"loss_compute", "ratio_eval", "indecision"} <= one.keys()
        assert (
            {"whole": "loss_complete", "part": "loss_complete", "distill": "loss_features"}[name] in one
        ) == (step < 2)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-7), step


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_weights_and_averages_end_the_same(runs: dict[Any, dict[str, Any]], name: str, kind: str) -> None:
    for what in ("weights", "ema", "closed"):
        assert runs[name, kind][what].keys() == runs[name][what].keys()
        for key, tensor in runs[name][what].items():
            torch.testing.assert_close(runs[name, kind][what][key], tensor, rtol=0, atol=ADAM_NOISE)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_checkpoint_of_two_processes_continues_as_one(
    runs: dict[Any, dict[str, Any]], name: str, kind: str
) -> None:
    out = runs["out"]["path"]
    checkpoint = find_checkpoint(out / f"{name}-{kind}", "auto")
    assert checkpoint is not None
    cfg = settings(configs(checkpoint_backbone(checkpoint), out), 16, name)
    dataset = make_dataset(cfg.data)
    model, teacher = build_model(cfg, dataset.num_classes)
    trainer = Trainer(model, cfg, dataset, teacher)
    trainer.load(load_checkpoint(checkpoint))
    trainer.step()
    assert trainer.metrics() == pytest.approx(runs[name]["records"][-1], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_checkpoint_continues_to_the_bit_on_as_many_processes(
    runs: dict[Any, dict[str, Any]], name: str, kind: str
) -> None:
    seen = runs[name, kind]
    resumed = seen["resumed"][kind]
    assert resumed["record"] == seen["records"][-1]
    for what, before in (("model", "weights"), ("ema", "ema"), ("optimizer", "optimizer")):
        assert resumed[what].keys() == seen[before].keys()
        for key, tensor in seen[before].items():
            assert torch.equal(resumed[what][key], tensor), (what, key)


@pytest.mark.parametrize("name", WARMUPS)
def test_fsdp_continues_a_checkpoint_of_ddp(runs: dict[Any, dict[str, Any]], name: str) -> None:
    seen = runs[name, "fsdp"]
    resumed = seen["resumed"]["ddp"]
    assert resumed["record"] == pytest.approx(runs[name, "ddp"]["records"][-1], rel=1e-4, abs=1e-7)
    for key, tensor in runs[name, "ddp"]["weights"].items():
        torch.testing.assert_close(resumed["model"][key], tensor, rtol=0, atol=ADAM_NOISE)


def test_bf16_is_autocast_under_fsdp_as_under_ddp(runs: dict[Any, dict[str, Any]]) -> None:
    ddp, fsdp, full = runs["bf16", "ddp"], runs["bf16", "fsdp"], runs["whole", "fsdp"]
    assert (ddp["kind"], fsdp["kind"]) == ("DistributedType.MULTI_CPU", "DistributedType.FSDP")
    for mine, theirs in zip(fsdp["gates"], ddp["gates"], strict=True):
        for gate, other in zip(mine, theirs, strict=True):
            assert gate.dtype == torch.float32 and torch.equal(gate, other)
    for one, two in zip(ddp["records"], fsdp["records"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-7)
    half, whole = fsdp["records"][0]["loss_mse"], full["records"][0]["loss_mse"]
    assert half != pytest.approx(whole, rel=1e-5)  # bf16 has 8 bits
    assert half == pytest.approx(whole, rel=1e-2)
    for key, gradient in ddp["gradients"].items():
        assert fsdp["gradients"][key].dtype == torch.float32
        torch.testing.assert_close(fsdp["gradients"][key], gradient, rtol=1e-4, atol=1e-6)


def test_the_compute_loss_alone_trains_on_two_processes(runs: dict[Any, dict[str, Any]]) -> None:
    ddp, fsdp = runs["compute", "ddp"]["records"], runs["compute", "fsdp"]["records"]
    for one, two in zip(ddp, fsdp, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-7)
    assert ddp[0]["skipped"] == 0 and "loss_complete" in ddp[1] and "loss_complete" not in ddp[2]


def checkpoint_backbone(checkpoint: Path) -> Path:
    return Path(load_checkpoint(checkpoint).state["config"]["backbone"])
