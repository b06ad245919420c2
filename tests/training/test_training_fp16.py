"""Loss scaling: accelerate set up as for fp16 on a GPU, on the CPU, whose autocast and scaler do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from dydit import convert, load_backbone
from dydit.config import RunConfig, TrainConfig
from dydit.training import Trainer, make_dataset
from dydit.training.acceleration import make_accelerator

MakeConfig = Callable[..., RunConfig]
MakeTrainer = Callable[..., Trainer]
OVERFLOWING = {"init_scale": 2.0**60, "backoff_factor": 2.0**-48}  # fits at the second attempt


@pytest.fixture
def make_fp16(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeTrainer]:
    """Builds a trainer that runs in fp16 with a scaler of the given settings."""

    def make(scaler: dict[str, float], **train: Any) -> Trainer:
        def on_cpu(section: TrainConfig) -> Accelerator:
            accelerator = make_accelerator(section)
            accelerator.state._mixed_precision = "fp16"
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
            return accelerator

        monkeypatch.setattr("dydit.training.trainer.make_accelerator", on_cpu)
        return build(make_config(train=train))

    yield make
    AcceleratorState._reset_state()


def build(cfg: RunConfig) -> Trainer:
    assert cfg.backbone is not None
    torch.manual_seed(0)  # the routers' first weights
    return Trainer(convert(load_backbone(cfg.backbone), cfg.dydit), cfg, make_dataset(cfg.data))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.plain.state_dict().items()}


def test_scaled_steps_are_those_of_float32_up_to_rounding(
    make_config: MakeConfig, make_fp16: MakeTrainer
) -> None:
    records = []
    for trainer in (build(make_config(train={"clip_norm": 0.1})), make_fp16({}, clip_norm=0.1)):
        trainer.step()
        records.append(trainer.metrics())
    full, half = records
    assert full["grad_norm"] > 0.1  # clipped, so the norm must be that of unscaled gradients
    for key in ("loss", "grad_norm", "ratio"):
        assert half[key] == pytest.approx(full[key], rel=1e-2)
    assert half["loss"] != pytest.approx(full["loss"], rel=1e-7)  # it was not float32


def test_an_overflow_skips_the_step_and_lowers_the_scale(make_fp16: MakeTrainer) -> None:
    trainer = make_fp16(OVERFLOWING)
    before = weights(trainer)
    trainer.step()
    assert trainer.progress.skipped == trainer.progress.skipped_in_a_row == 1
    assert trainer.accelerator.scaler is not None and trainer.accelerator.scaler.get_scale() == 2.0**12
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    assert not trainer.raw_optimizer.state
    trainer.step()
    assert trainer.progress.skipped == 1 and trainer.progress.skipped_in_a_row == 0
    assert trainer.raw_optimizer.state
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_the_scale_is_part_of_a_checkpoint(make_fp16: MakeTrainer) -> None:
    """Three steps straight, the first of them an overflow, against two, a checkpoint and one."""
    straight, first, second = (make_fp16(OVERFLOWING) for _ in range(3))
    for _ in range(3):
        straight.step()
    first.step()
    first.step()
    second.load(first.snapshot())
    second.step()
    assert [t.accelerator.scaler.state_dict() for t in (straight, second)] == [  # type: ignore[union-attr]
        {"scale": 2.0**12, "growth_factor": 2.0, "backoff_factor": 2.0**-48, "growth_interval": 2000,
         "_growth_tracker": 2}
    ] * 2  # fmt: skip
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(second)[name]), name
