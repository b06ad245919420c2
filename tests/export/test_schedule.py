from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from core_builders import TIMESTEPS, random_masks, route_widths, small_dit, small_dydit

from dydit.config import DyDiTConfig
from dydit.costs import static_macs
from dydit.dynamic.compute_loss import compute_ratio
from dydit.dynamic.convert import convert
from dydit.errors import ScheduleError
from dydit.export.fingerprint import weights_sha256
from dydit.export.schedule import SubnetSchedule
from dydit.routing.routing import Routing
from dydit.shapes import CONDITIONINGS


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_masks_are_the_routers_decisions(conditioning: str) -> None:
    model = small_dydit(conditioning=conditioning, config=DyDiTConfig(mlp_groups=8, token_router_ratio=4))
    heads, groups = random_masks(1, 3, model.shape)
    route_widths(model, TIMESTEPS, heads, groups)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, sampler={"name": "ddim"})
    assert schedule.timesteps == TIMESTEPS and schedule.sampler == {"name": "ddim"}
    assert schedule.heads.dtype == bool and (schedule.heads == heads).all()
    assert schedule.groups.shape == (3, 2, 8) and (schedule.groups == groups).all()
    assert schedule.weights == weights_sha256(model)


def test_equal_subnetworks_are_stored_once() -> None:
    model = small_dydit(mixed=False)
    open_everywhere = SubnetSchedule.from_model(model, range(100))
    assert open_everywhere.head_rows.shape == (1, 4) and open_everywhere.subnetworks_by_block == (1, 1)
    heads, groups = random_masks(0, 3, model.shape)
    heads[2], groups[2] = heads[0], groups[0]
    heads[:, 1], groups[:, 1] = heads[:1, 0], groups[:1, 0]
    route_widths(model, TIMESTEPS, heads, groups)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    assert len(schedule.head_rows) == len(schedule.group_rows) == 2
    assert schedule.subnetworks_by_block == (2, 1)
    assert (schedule.heads == heads).all() and (schedule.groups == groups).all()


def test_from_model_thresholds_and_leaves_the_model_in_its_mode() -> None:
    model = convert(small_dit(), DyDiTConfig(open_bias=0.2, threshold=0.5)).train()
    state = torch.get_rng_state()
    schedule = SubnetSchedule.from_model(model, torch.arange(5))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert schedule.heads.all() and schedule.groups.all()  # with noise, most of 80 gates would not be
    strict = convert(small_dit(), DyDiTConfig(open_bias=0.2, threshold=0.6))
    assert SubnetSchedule.from_model(strict, [1]).heads.tolist() == [[[True, False, False, False]] * 2]
    assert not strict.training


@pytest.mark.parametrize("timesteps", [[], [1.0, 2.0, 1.0], [0.1, float(np.float32(0.1))]])
def test_no_timestep_or_one_twice_is_refused(timesteps: list[float]) -> None:
    with pytest.raises(ScheduleError, match=r"\d timesteps, \d of them distinct.*; expected at least one"):
        SubnetSchedule.from_model(small_dydit(mixed=False), timesteps)


def test_timesteps_are_looked_up_as_float32() -> None:
    model = small_dydit(mixed=False)
    schedule = SubnetSchedule.from_model(model, [999.0, 0.1, 333.3333333])
    for i, t in enumerate(schedule.timesteps):
        assert schedule.index_of(t) == i
        assert schedule.index_of(torch.tensor(t, dtype=torch.float32).item()) == i
    with pytest.raises(
        ScheduleError, match=r"timestep 5; expected one of .* 3 \(999, 0.1, 333.333\); export"
    ):
        schedule.index_of(5)
    with pytest.raises(ScheduleError, match=r"schedule's 100 \(0, 1, … 99\)"):
        SubnetSchedule.from_model(model, range(100)).index_of(100)


def test_macs_are_those_of_the_compute_loss() -> None:
    model = small_dydit()
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    heads, groups = (torch.from_numpy(masks).float() for masks in (schedule.heads, schedule.groups))
    shape, config = model.shape, model.routing_config
    for kept in (shape.tokens, 5, 0):
        tokens = torch.zeros(3, 2, shape.tokens)
        tokens[..., :kept] = 1
        ratio = compute_ratio(shape, config, Routing(heads, groups, tokens))
        macs = schedule.macs_per_timestep(np.full((3, 2), kept))
        assert (macs / static_macs(shape)).tolist() == pytest.approx(ratio.tolist(), rel=1e-6)
    assert (schedule.macs_per_timestep() == schedule.macs_per_timestep(np.full((3, 2), 16))).all()


def test_the_manifest_is_plain_json_and_says_what_belongs_together() -> None:
    model = small_dydit(sample_size=(8, 4))
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, sampler={"name": "ddim", "steps": 3})
    manifest = schedule.manifest
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["architecture"] == "DyDiT" and manifest["timesteps"] == list(TIMESTEPS)
    assert manifest["shape"]["sample_size"] == [8, 4] and manifest["weights_sha256"] == schedule.weights
    assert manifest["thresholds"] == {"width": 0.5, "tokens": 0.5}
    assert manifest["sampler"] == {"name": "ddim", "steps": 3}
    assert manifest["macs_per_timestep_all_tokens"] == schedule.macs_per_timestep().tolist()
