"""``train.compile``: torch.compile's model trains as the eager one does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dydit.config import RunConfig
from dydit.training import Trainer, make_dataset
from dydit.training.run import build_model

STEPS = 3
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


def observed(cfg: RunConfig) -> tuple[list[dict[str, float]], dict[str, Tensor], set[str]]:
    """Records of a few steps, the weights after them, and the names under which a checkpoint has them."""
    dataset = make_dataset(cfg.data)
    torch.manual_seed(cfg.seed)
    model, backbone = build_model(cfg, dataset.num_classes)
    trainer = Trainer(model, cfg, dataset, backbone)
    records = []
    for _ in range(STEPS):
        trainer.step()
        records.append(trainer.metrics())
    names = set(trainer.snapshot().tensors["model"])
    trained = {name: tensor.clone() for name, tensor in trainer.plain.state_dict().items()}
    assert trainer.close() is model  # without the compiler's wrapper
    return records, trained, names


def test_the_compiled_model_trains_as_the_eager_one(make_config: Callable[..., RunConfig]) -> None:
    """Gates, warm-up, a falling temperature and the evaluation between steps included."""
    changes: dict[str, Any] = {
        "warmup": {"mode": "complete", "steps": 2, "fraction": 0.5},
        "gates": {"final_temperature": 0.5, "anneal_steps": 2, "decisiveness": 0.1},
    }
    eager, weights, names = observed(make_config(**changes))
    compiled, compiled_weights, compiled_names = observed(make_config(train={"compile": True}, **changes))
    assert compiled_names == names == set(weights)
    for step, (one, other) in enumerate(zip(eager, compiled, strict=True)):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6), step
        assert 0 < one["ratio"] < 1  # gates were closed, so there was something to decide
    for name, tensor in weights.items():
        # Adam turns the rounding of a gradient that is zero in theory into steps of up to the rate.
        torch.testing.assert_close(compiled_weights[name], tensor, rtol=0, atol=2 * STEPS * 1e-3)
