from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_builders import TIMESTEPS, random_masks, route_widths, small_dit, small_dydit
from hypothesis import given
from hypothesis import strategies as st

from dydit.config import DyDiTConfig
from dydit.costs import static_macs
from dydit.dynamic.compute_loss import compute_ratio
from dydit.dynamic.convert import convert
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ScheduleError
from dydit.export.artefact import read_artefact, write_artefact
from dydit.export.fingerprint import weights_sha256
from dydit.export.schedule import SubnetSchedule
from dydit.routing.routing import Routing
from dydit.runtime.packs import SchedulePacks
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


def capacities_of(model: DyDiT, seed: int = 0) -> np.ndarray:
    """Capacities (S, L), with none and all among them."""
    N = model.shape.tokens
    drawn = np.random.default_rng(seed).integers(0, N + 1, (len(TIMESTEPS), model.shape.depth))
    drawn[0, 0], drawn[1, 1] = 0, N
    return drawn


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_timestep_that_is_no_number_is_refused(wrong: float) -> None:
    with pytest.raises(ScheduleError, match="timesteps .*; expected numbers; give those of a sampler"):
        SubnetSchedule.from_model(small_dydit(), [500.0, wrong])


def test_capacities_beyond_int32_do_not_wrap_around() -> None:
    model = small_dydit()
    capacities = capacities_of(model).astype(np.int64)
    capacities[0, 0] += 1 << 32
    with pytest.raises(ScheduleError, match="capacities"):
        SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_capacities_and_calibration_are_saved_and_loaded(conditioning: str, tmp_path: Path) -> None:
    model = small_dydit(conditioning=conditioning)
    capacities = capacities_of(model)
    found = {"target": 0.5, "ratio": {"before": 0.61, "after": 0.502}}
    schedule = SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities, calibration=found)
    schedule.save(tmp_path)
    loaded = SubnetSchedule.load(tmp_path)
    assert loaded.capacities is not None and loaded.capacities.dtype == np.int32
    assert (loaded.capacities == capacities).all()
    assert loaded.calibration == found == loaded.manifest["calibration"]
    assert (loaded.macs_per_timestep(loaded.capacities) == schedule.macs_per_timestep(capacities)).all()
    told = loaded.manifest["macs_per_timestep_at_capacity"]
    assert (
        told
        == schedule.macs_per_timestep(capacities).tolist()
        != loaded.manifest["macs_per_timestep_all_tokens"]
    )


def test_a_schedule_from_before_there_were_capacities_loads(tmp_path: Path) -> None:
    SubnetSchedule.from_model(small_dydit(), TIMESTEPS).save(tmp_path)
    tensors, fields = read_artefact(tmp_path)
    old = {name: value for name, value in fields.items() if name not in ("calibration", "view_share")}
    write_artefact(tmp_path, tensors, old)
    loaded = SubnetSchedule.load(tmp_path)
    assert loaded.capacities is None and loaded.calibration == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c[:2], r"shape \(2, 2\) and type int32; expected int32 \(3, 2\)"),
        (lambda c: c.astype(np.float32), r"type float32; expected int32"),
        (lambda c: c - 1, r"capacities from -1 to 15; expected 0 to 16 tokens"),
        (lambda c: c + 1, r"capacities from 1 to 17; expected 0 to 16 tokens"),
    ],
)
def test_capacities_that_do_not_fit(change: Callable[[Any], Any], told: str) -> None:
    model = small_dydit()
    with pytest.raises(ScheduleError, match=told):
        SubnetSchedule.from_model(model, TIMESTEPS, capacities=change(capacities_of(model)))


def test_capacities_without_token_routers_are_all_tokens() -> None:
    model = small_dydit(config=DyDiTConfig(token_routing=False))
    every = np.full((3, 2), 16)
    assert SubnetSchedule.from_model(model, TIMESTEPS, capacities=every).capacities.tolist() == every.tolist()
    with pytest.raises(ScheduleError, match="capacity of 15 tokens for a model without token routers"):
        SubnetSchedule.from_model(model, TIMESTEPS, capacities=every - 1)


def test_broken_capacities_in_a_file(tmp_path: Path) -> None:
    """With matching checksums, as another program would write them."""
    model = small_dydit()
    SubnetSchedule.from_model(model, TIMESTEPS, capacities=capacities_of(model)).save(tmp_path)
    tensors, fields = read_artefact(tmp_path)
    for broken in (tensors["capacities"][:1], tensors["capacities"] + 1, tensors["capacities"].astype(float)):
        write_artefact(tmp_path, {**tensors, "capacities": broken}, fields)
        with pytest.raises(ScheduleError, match="capacities"):
            SubnetSchedule.load(tmp_path)


@given(seed=st.integers(0, 10_000))
def test_view_share_counts_the_packings_that_copy_nothing(seed: int) -> None:
    model = small_dydit(mixed=False)
    heads, groups = random_masks(seed, len(TIMESTEPS), model.shape, always_on=False)
    heads[..., 0] = groups[..., 0] = True
    route_widths(model, TIMESTEPS, heads, groups)
    schedule = SubnetSchedule.from_model(model, TIMESTEPS)
    blocks = model.adapter.blocks(model.backbone)
    packs = SchedulePacks([(model.adapter.attention(b), model.adapter.mlp(b)) for b in blocks], schedule)
    copied = []
    for step in range(len(TIMESTEPS)):
        for block in range(model.shape.depth):
            with packs.use(step, block) as packed:
                copied.append(packed.copied_bytes)
    assert schedule.view_share == pytest.approx(np.mean([not bytes_ for bytes_ in copied]))


@pytest.mark.parametrize("kind", ["head_router", "group_router"])
def test_a_router_that_gives_nan_is_refused_by_name(kind: str) -> None:
    """Thresholded, NaN would count as closed, and the schedule would look like any other."""
    model = small_dydit()
    with torch.no_grad():
        getattr(model.routers[1], kind).router.bias[0] = torch.nan
    with pytest.raises(ScheduleError, match=rf"router dynamic_blocks\.1\.routers\.{kind} are NaN; expected"):
        SubnetSchedule.from_model(model, TIMESTEPS)
