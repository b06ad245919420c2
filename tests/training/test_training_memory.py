"""What a step needs, by count and by measurement."""

from __future__ import annotations

import torch
from torch import nn

from dydit.config import TrainConfig
from dydit.training.memory import SavedForBackward, describe_state, state_memory


def test_the_state_is_counted_in_bytes_of_float32() -> None:
    model = nn.Linear(10, 6)  # 66 parameters
    model.bias.requires_grad_(False)
    memory = state_memory(model, TrainConfig(steps=1))
    assert (memory.weights, memory.gradients, memory.moments, memory.averages) == (264, 240, 480, 264)
    assert state_memory(model, TrainConfig(steps=1, ema_device="cpu")).averages == 0
    taught = state_memory(model, TrainConfig(steps=1), shards=2, teacher=nn.Linear(1, 1))
    assert (taught.weights, taught.teacher, taught.total) == (132, 8, 132 + 120 + 240 + 132 + 8)
    assert "weights 0.0 + gradients 0.0" in describe_state(memory)


def test_what_a_backward_keeps_is_measured_without_parameters_and_once() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Sigmoid(), nn.Linear(32, 1))
    x = torch.randn(4, 8)
    with SavedForBackward(model) as saved:
        for _ in range(3):
            model(x).sum().backward()
    # The input and the sigmoid's output, which the second layer needs as well; freed after each backward.
    assert saved.peak == 4 * (4 * 8 + 4 * 32)
