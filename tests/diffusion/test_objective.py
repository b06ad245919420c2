from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dydit.config import ObjectiveConfig
from dydit.diffusion import DiffusionLoss, make_objective
from dydit.diffusion.flow import FlowObjective
from dydit.diffusion.iddpm import IDDPMObjective
from dydit.errors import ConfigError


def test_settings_reach_the_objective() -> None:
    settings = ObjectiveConfig(name="iddpm", num_timesteps=250, stratified=False)
    assert make_objective(settings, learn_sigma=True) == IDDPMObjective(250, True, False)
    settings = ObjectiveConfig(name="flow")
    assert make_objective(settings, learn_sigma=False) == FlowObjective(1000, False, True)


def test_an_unknown_name_is_refused() -> None:
    settings = SimpleNamespace(name="edm", num_timesteps=1000, stratified=True)
    with pytest.raises(ConfigError, match="objective 'edm'; expected one of iddpm, flow"):
        make_objective(settings, learn_sigma=True)


@pytest.mark.parametrize("name", ["iddpm", "flow"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_training_step_looks_the_same_for_all(name: Any, learn_sigma: bool) -> None:
    objective = make_objective(ObjectiveConfig(name=name), learn_sigma)
    x0, noise = torch.randn(5, 3, 4, 8), torch.randn(5, 3, 4, 8)
    t = objective.sample_t(5, torch.Generator().manual_seed(0), x0.device)
    assert t.shape == (5,) and t.min() >= 0 and t.max() < objective.num_timesteps
    x_t = objective.corrupt(x0, noise, t)
    output = torch.zeros(5, 6 if learn_sigma else 3, 4, 8)
    loss = objective.loss(output, x0, x_t, noise, t)
    assert isinstance(loss, DiffusionLoss)
    assert x_t.shape == x0.shape and loss.total.shape == (5,) and torch.isfinite(loss.total).all()
