"""Parameter groups, the learning rate over the steps, averaged weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dydit import convert, load_backbone
from dydit.config import TrainConfig
from dydit.training.optim import lr_factor, make_ema, make_optimizer, set_learning_rate


def test_routers_have_a_rate_of_their_own(backbone_folder: Path) -> None:
    model = convert(load_backbone(backbone_folder))
    optimizer = make_optimizer(model, TrainConfig(steps=1, lr=1e-4, router_lr=1e-2, betas=(0.8, 0.9)))
    backbone, routers = optimizer.param_groups
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone_parameters()}
    assert {id(p) for p in routers["params"]} == {id(p) for p in model.router_parameters()}
    assert (backbone["lr"], routers["lr"]) == (1e-4, 1e-2)
    assert backbone["betas"] == (0.8, 0.9) and backbone["weight_decay"] == 0
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.1)  # of the full rate, not of the last one
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-3])


def test_frozen_parameters_are_left_out(backbone_folder: Path) -> None:
    model = load_backbone(backbone_folder)
    model.y_embedder.requires_grad_(False)
    [group] = make_optimizer(model, TrainConfig(steps=1)).param_groups
    assert len(group["params"]) == len(list(model.parameters())) - 1


def test_the_rate_rises_through_its_warm_up_and_follows_its_schedule() -> None:
    def factors(schedule: str) -> list[float]:
        config = TrainConfig(steps=14, lr_schedule=schedule, lr_warmup_steps=4)
        return [lr_factor(config, step) for step in range(15)]

    assert factors("constant")[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors("constant")[4:] == [1.0] * 11
    assert factors("linear")[4:] == pytest.approx([1 - k / 10 for k in range(11)])
    assert factors("cosine")[4:] == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)])


def test_the_average_follows_its_recurrence_with_a_slow_start() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = make_ema(model, TrainConfig(steps=1, ema_decay=0.5))
    average, decays = 0.0, [0.0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]
    for step, decay in enumerate(decays):
        value = float(step**2)
        nn.init.constant_(model.weight, value)
        ema.step(model.parameters())
        average = decay * average + (1 - decay) * value
        assert ema.shadow_params[0].item() == pytest.approx(average)


def test_no_decay_means_no_averaging() -> None:
    model = nn.Linear(2, 2)
    ema = make_ema(model, TrainConfig(steps=1, ema_decay=0.0))
    for _ in range(3):
        nn.init.normal_(model.weight)
        ema.step(model.parameters())
        torch.testing.assert_close(ema.shadow_params[0], model.weight.detach())
