"""Every conditioning design converts, fine-tunes, exports and runs sliced, under the two promises."""

from __future__ import annotations

import pytest
import torch
from core_builders import TIMESTEPS, relative_error, small_dit, small_inputs
from torch import Tensor

from dydit.compute.analytic import executed_macs
from dydit.compute.counting import count_macs
from dydit.config import DyDiTConfig, ObjectiveConfig
from dydit.diffusion import make_objective
from dydit.dynamic.compute_loss import compute_loss, compute_ratio
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine
from dydit.shapes import CONDITIONINGS

STEPS, TARGET = 30, 0.5


def finetuned(design: str) -> tuple[DyDiT, Tensor, Tensor, list[float]]:
    """A converted model of a design after some fine-tuning, its data, and the compute at each step."""
    torch.manual_seed(0)
    backbone = small_dit(conditioning=design)
    model = convert(backbone, DyDiTConfig(open_bias=2.0, token_open_bias=2.0, temperature=1.0)).train()
    x0, y = small_inputs(model.shape, batch=8)
    objective = make_objective(ObjectiveConfig(), learn_sigma=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ratios = []
    for _ in range(STEPS):
        t, noise = objective.sample_t(len(x0)), torch.randn_like(x0)
        x_t = objective.corrupt(x0, noise, t)
        output, routing = model(x_t, t, y, return_routing=True)
        ratio = compute_ratio(model.shape, model.routing_config, routing)
        loss = objective.loss(output, x0, x_t, noise, t).total.mean() + 10 * compute_loss(ratio, TARGET)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.router_parameters())
        optimizer.step()
        ratios.append(ratio.mean().item())
    return model.eval(), x0, y, ratios


@pytest.mark.parametrize("design", CONDITIONINGS)
def test_a_design_finetunes_exports_and_runs_sliced(design: str) -> None:
    model, x, y, ratios = finetuned(design)
    assert abs(ratios[-1] - TARGET) < abs(ratios[0] - TARGET)  # the compute loss moves the routers
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    for step in TIMESTEPS:
        with torch.no_grad():
            masked, routing = model(x, step, y, return_routing=True)
        assert relative_error(engine(x, step, y), masked) < 1e-5
        report = count_macs(engine, x, step, y)
        assert report.total == executed_macs(model.shape, model.routing_config, routing).sum()
        assert report.unsupported == {}
