"""The synthetic subject: the asked compute, scattered masks that change slowly, tokens by what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_builders import SMALL, peaks_in_this_process
from core_builders import embedded
from hypothesis import given
from hypothesis import strategies as st

from dydit.benchmark import peaks
from dydit.benchmark.peaks import measure_memory
from dydit.benchmark.settings import BenchSettings, CaseSettings, plan_cases
from dydit.benchmark.subject import Subject, make_subject, recording_kept
from dydit.benchmark.synthetic import even_share
from dydit.benchmark.variants import make_variants
from dydit.compute.engine import count_engine, engine_table
from dydit.config import DyDiTConfig
from dydit.costs import outer_macs, static_macs
from dydit.dynamic.compute_loss import deployed_cost
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError
from dydit.models.dit import DiT
from dydit.runtime import engine as engine_module
from dydit.runtime import on_cpu, sliced
from dydit.runtime.ahead import Ahead
from dydit.runtime.engine import SubnetEngine
from dydit.runtime.sliced import filled_up
from dydit.shapes import ModelShape

SHAPE = ModelShape((32, 32), 2, 4, 8, 768, 12, 12, 3072, 12, 1000)  # DiT-B/2


def subject_of(dtype: str = "fp32", **changes: object) -> Subject:
    chosen = BenchSettings(**{**SMALL, **changes})
    size, depth = chosen.sample_size, chosen.depth
    return make_subject(chosen, CaseSettings(dtype=dtype, batches=(2,), sample_size=size, depth=depth))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(depth=4, sample_size=16)


@pytest.fixture()
def announced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """Timesteps of each run that an engine is told before its first call."""
    seen: list[tuple[float, ...]] = []
    original = Ahead.__init__

    def init(self: Ahead, model: DyDiT, timesteps: Sequence[float], y: torch.Tensor) -> None:
        seen.append(tuple(timesteps))
        original(self, model, timesteps, y)

    monkeypatch.setattr(Ahead, "__init__", init)
    return seen


def deployed_ratio(subject: Subject, images: int = 8) -> float:
    """Compute of every call of a sampling run over the static one's."""
    engine = SubnetEngine(subject.model, subject.schedule)
    with recording_kept(engine) as (call, kept):
        subject.sample(call, images)
        counts = kept()
    macs = [engine_table(engine, t, k).total for t, k in zip(subject.schedule.timesteps, counts, strict=True)]
    return float(np.mean(macs)) / images / static_macs(subject.model.shape)


def test_a_run_that_is_counted_is_the_one_that_is_timed(
    subject: Subject, announced: list[tuple[float, ...]]
) -> None:
    """Announced, as roundings decide which of the tokens near the threshold are kept."""
    engine = SubnetEngine(subject.model, subject.schedule)
    timed = subject.sample(engine, 2)
    with recording_kept(engine) as (call, kept):
        assert torch.equal(subject.sample(call, 2), timed)
        assert len(kept()) == len(subject.schedule.timesteps)
    assert announced == [tuple(subject.sampler.call_timesteps)] * 2


def test_memory_is_measured_in_an_announced_run(
    subject: Subject, announced: list[tuple[float, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "subprocess", SimpleNamespace(run=peaks_in_this_process))
    chosen = BenchSettings(**{**SMALL, "depth": 4, "sample_size": 16})
    case = CaseSettings(dtype="fp32", batches=(1, 2), sample_size=16, depth=4)
    measure_memory(subject, chosen, case)
    assert announced == [tuple(subject.schedule.timesteps)] * 2 * len(chosen.modes)


@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.7])
def test_a_sampling_run_deploys_the_asked_ratio(ratio: float) -> None:
    subject = subject_of(depth=4, sample_size=16, ratio=ratio, whole_run=16)
    assert deployed_ratio(subject) == pytest.approx(ratio, rel=0.02)
    fixed = subject.schedule.macs_per_timestep(subject.schedule.capacities).mean()
    assert fixed / static_macs(subject.model.shape) == pytest.approx(ratio, rel=0.02)


def test_bf16_deploys_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine_module, sliced, on_cpu):  # the same sizes on every CPU
        monkeypatch.setattr(module, "filled_up", partial(filled_up, sizes=16))
    subject = subject_of("bf16", depth=4, sample_size=16, whole_run=16)
    assert next(subject.model.parameters()).dtype == torch.bfloat16
    # The tokens that fill up an MLP's batch are counted too.
    assert deployed_ratio(subject) == pytest.approx(0.5, rel=0.03)


def test_heads_groups_and_tokens_run_in_similar_shares(subject: Subject) -> None:
    plan = subject.schedule
    share = even_share(plan.shape, plan.routing, 0.5)
    assert 0.55 < share < 0.75
    assert plan.capacities is not None
    shares = plan.heads.mean(), plan.groups.mean(), plan.capacities.mean() / plan.shape.tokens
    assert shares == pytest.approx((share,) * 3, abs=0.02)


def test_masks_are_scattered_and_change_a_little_at_a_time(subject: Subject) -> None:
    plan = subject.schedule
    assert plan.view_share < 0.2
    assert min(plan.subnetworks_by_block) > 3
    masks = np.concatenate([plan.heads, plan.groups], axis=-1).astype(int)  # (S, L, H+G)
    near = np.abs(np.diff(masks, axis=0)).mean()
    far = np.abs(masks[: len(masks) // 2] - masks[len(masks) // 2 :]).mean()
    assert near < 0.3 * far
    assert 0.3 < (plan.rows[1:] == plan.rows[:-1]).mean() < 0.95
    assert not np.array_equal(masks[:, 0], masks[:, 1])


def test_which_tokens_are_kept_depends_on_the_sample(subject: Subject) -> None:
    x, y = subject.noise(4)
    _, routing = subject.model(x, torch.full((4,), 500.0), y, return_routing=True)
    kept = routing.tokens  # (B, L, N)
    assert (kept[0] != kept[1]).float().mean() > 0.2
    assert kept.mean() == pytest.approx(0.64, abs=0.1)


def test_blocks_are_not_the_identity_and_weights_are_the_same_every_time(subject: Subject) -> None:
    x, y = subject.noise(2)
    first = subject.static(x, 500.0, y)
    assert isinstance(subject.static, DiT)
    assert first.std() > 0.1
    block, cond = subject.static.blocks[1], embedded(subject.static, x, 500.0, y)
    assert (block(*cond) - cond[0]).std() > 0.05
    again = subject_of(depth=4, sample_size=16)
    assert again.schedule.weights == subject.schedule.weights
    assert subject_of(depth=4, sample_size=16, seed=1).schedule.weights != subject.schedule.weights


def test_a_sampling_run_keeps_the_scale_of_its_latents(subject: Subject) -> None:
    for sampler in ("ddim", "dpm++", "flow_euler"):
        run = subject_of(sampler=sampler, whole_run=10)
        assert run.sample(run.static, 4).std() == pytest.approx(1.0, rel=0.5)
    guided = subject_of(guidance=True, whole_run=10)
    assert guided.guided and len(guided.noise_call(3)[0]) == 6
    assert guided.sample(guided.static, 4).std() == pytest.approx(1.0, rel=0.5)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_counted_equals_analytic_and_the_engine_equals_the_masked_model(subject: Subject, mode: str) -> None:
    engine = SubnetEngine(subject.model, subject.schedule, mode=mode)  # type: ignore[arg-type]
    x, y = subject.noise(3)
    call = count_engine(engine, x, subject.schedule.timesteps[7], y)
    assert call.analytic.differences(call.counted.table) == []
    capacities = None if subject.schedule.capacities is None else subject.schedule.capacities[7].tolist()
    chosen = {"capacities": capacities} if mode == "capacity" else {}
    masked = subject.model(x, torch.full((3,), subject.schedule.timesteps[7]), y, **chosen)
    assert torch.allclose(engine(x, subject.schedule.timesteps[7], y), masked, rtol=1e-4, atol=1e-4)


def test_all_on_is_the_backbone(subject: Subject) -> None:
    engine = SubnetEngine(subject.model, subject.all_on(), verify=False)
    x, y = subject.noise(2)
    t = subject.schedule.timesteps[3]
    assert torch.allclose(engine(x, t, y), subject.static(x, t, y), rtol=1e-4, atol=1e-4)
    assert engine.pack_statistics().bytes == 0


def test_the_networks_share_one_set_of_weights(subject: Subject) -> None:
    chosen = BenchSettings(**SMALL)
    variants = make_variants(subject, chosen)
    assert set(variants.networks) == {"static", "masked", "exact", "capacity", "all_on"}
    assert all(engine.model is subject.model for engine in variants.engines.values())
    swept = make_variants(subject, chosen.model_copy(update={"sweep": "batch"}))
    assert set(swept.networks) == {"static", "exact", "capacity"}


@given(ratio=st.floats(0.1, 1.0), depth=st.integers(1, 28), tokens=st.sampled_from([4, 8, 16]))
def test_even_share_solves_the_cost(ratio: float, depth: int, tokens: int) -> None:
    shape = replace(SHAPE, depth=depth, sample_size=(2 * tokens, 2 * tokens))
    share = even_share(shape, DyDiTConfig(), ratio)
    counts = share * shape.num_heads, share * shape.mlp_groups, share * shape.tokens
    macs = outer_macs(shape) + depth * deployed_cost(shape, DyDiTConfig()).executed(*counts)
    # Token routers make everything on cost a little more than the static backbone: then the share is below 1.
    assert 0 < share <= 1
    assert macs == pytest.approx(ratio * static_macs(shape), rel=1e-6)


def test_a_ratio_below_what_is_always_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="always on"):
        subject_of(ratio=0.01)


def test_cases_of_a_sweep() -> None:
    def sizes(**changes: object) -> list[tuple[int | None, int | None, tuple[int, ...]]]:
        chosen = BenchSettings(**{"subject": "DiT-XL/2", "dtypes": ("fp32",), **changes})  # type: ignore[arg-type]
        return [(case.depth, case.sample_size, case.batches) for case in plan_cases(chosen, 28)]

    assert sizes() == [(28, 32, (2, 8))]
    assert sizes(sweep="batch") == [(28, 32, (1, 2, 4, 8, 16))]
    assert sizes(sweep="tokens", batches=(2,)) == [(28, side, (2,)) for side in (16, 32, 64)]
    assert sizes(sweep="depth", batches=(4,)) == [(depth, 32, (4,)) for depth in (4, 7, 14, 28)]
    assert sizes(batches=(8, 2)) == [(28, 32, (2, 8))]
