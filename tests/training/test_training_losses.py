"""The losses against their formulas, and who gets a gradient from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dydit import DyDiT, DyDiTConfig, convert, load_backbone
from dydit.config import ComputeConfig, DataConfig, ObjectiveConfig, RunConfig, WarmupConfig
from dydit.diffusion import make_objective
from dydit.dynamic.compute_loss import compute_ratio, pooled_mean
from dydit.errors import ConfigError
from dydit.routing.gates import logit
from dydit.routing.routing import RoutingLogits
from dydit.training.batch import DrawKey, NoisyBatch, draw, noisy_batch
from dydit.training.data import Batch
from dydit.training.features import block_outputs
from dydit.training.losses import (
    complete_terms,
    dynamic_terms,
    indecision,
    static_terms,
    teacher_terms,
)

OBJECTIVE = make_objective(ObjectiveConfig(), learn_sigma=True)
COMPUTE = ComputeConfig(target=0.5, weight=2.0, ramp_steps=10)


@pytest.fixture
def model(backbone_folder: Path) -> DyDiT:
    torch.manual_seed(0)
    config = DyDiTConfig(open_bias=0.5, token_open_bias=0.5, temperature=1.0)
    return convert(load_backbone(backbone_folder), config).train()


@pytest.fixture
def batch() -> NoisyBatch:
    shape = (8, 1, 8, 8)
    drawn = draw(DrawKey(0, 0), OBJECTIVE, DataConfig(class_dropout=0.5), shape, torch.device("cpu"))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return noisy_batch(Batch(images, torch.arange(8)), drawn, OBJECTIVE, null_label=10)


def terms(model: DyDiT, batch: NoisyBatch, step: int = 100, **options: Any) -> Any:
    return dynamic_terms(
        model, OBJECTIVE, batch,
        ratio_of=lambda routing: compute_ratio(model.shape, model.routing_config, routing),
        compute=COMPUTE, step=step, mean_over_ranks=lambda value: value.clone(), **options,
    )  # fmt: skip


def test_the_loss_is_diffusion_plus_weighted_squared_distance_to_the_target(
    model: DyDiT, batch: NoisyBatch
) -> None:
    torch.manual_seed(1)
    found = terms(model, batch)
    torch.manual_seed(1)
    output, routing = model(batch.x_t, batch.t, batch.y, return_routing=True)
    ratio = compute_ratio(model.shape, model.routing_config, routing).mean()
    diffusion = OBJECTIVE.loss(output, batch.x0, batch.x_t, batch.noise, batch.t).total.mean()
    torch.testing.assert_close(found.total, diffusion + 2.0 * (ratio - 0.5) ** 2)
    assert found.parts["ratio"] == ratio and 0.0 < ratio < 1.0
    assert not any(part.requires_grad for part in found.parts.values())


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_diffusion_loss_is_weighted_or_left_out(
    model: DyDiT, batch: NoisyBatch, backbone_folder: Path, weight: float
) -> None:
    found = []
    for options in ({}, {"diffusion_weight": weight}):
        torch.manual_seed(1)
        found.append(terms(model, batch, **options))
    once, weighted = found
    assert weighted.parts == once.parts and weighted.parts["loss_diffusion"] > 0
    difference = (weight - 1) * once.parts["loss_diffusion"]
    torch.testing.assert_close(weighted.total, once.total + difference)
    weighted.total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # as DDP wants it
    static = load_backbone(backbone_folder)
    plain, scaled = (static_terms(static, OBJECTIVE, batch, w).total for w in (1.0, weight))
    torch.testing.assert_close(scaled, weight * plain)


@pytest.mark.parametrize(("step", "target"), [(0, 1.0), (5, 0.75), (10, 0.5), (1000, 0.5)])
def test_the_target_falls_from_one_over_the_ramp(
    model: DyDiT, batch: NoisyBatch, step: int, target: float
) -> None:
    parts = terms(model, batch, step).parts
    torch.testing.assert_close(parts["loss_compute"], (parts["ratio"] - target) ** 2)


def test_the_compute_loss_alone_closes_every_router(model: DyDiT, batch: NoisyBatch) -> None:
    _, routing = model(batch.x_t, batch.t, batch.y, return_routing=True)
    ratio = compute_ratio(model.shape, model.routing_config, routing)
    ((ratio.mean() - 0.1) ** 2).backward()
    last_biases = [
        p for name, p in model.named_parameters()
        if name.endswith(("head_router.router.bias", "group_router.router.bias", "token_router.2.bias"))
    ]  # fmt: skip
    assert len(last_biases) == 3 * model.shape.depth
    for bias in last_biases:
        assert bias.grad is not None and (bias.grad > 0).all()  # descent lowers the scores


def test_ranks_average_their_gradients_to_that_of_the_whole_batch() -> None:
    weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    halves = [features[0::2], features[1::2]]
    whole_mean = (features @ weight).sigmoid().mean().detach()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad((value - 0.4) ** 2, weight)[0]

    parts = [pooled_mean((half @ weight).sigmoid(), lambda _: whole_mean) for half in halves]
    torch.testing.assert_close(parts[0], whole_mean)
    averaged = (gradient(parts[0]) + gradient(parts[1])) / 2
    torch.testing.assert_close(averaged, gradient((features @ weight).sigmoid().mean()))
    per_rank = sum(gradient((half @ weight).sigmoid().mean()) for half in halves) / 2
    assert not torch.allclose(averaged, per_rank)  # squaring each rank's own mean is another loss


class Recorder(nn.Module):
    """Passes calls on and remembers their arguments."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, *args: Tensor, **options: Any) -> Any:
        self.calls.append((args, options))
        return self.model(*args, **options)


def test_both_branches_see_the_same_noise_timesteps_and_dropped_labels(
    model: DyDiT, batch: NoisyBatch
) -> None:
    recorder = Recorder(model)
    complete_terms(recorder, OBJECTIVE, batch, WarmupConfig())
    terms(model, batch)  # the shape of the call is the same with or without a recorder
    dynamic_terms(
        recorder, OBJECTIVE, batch, ratio_of=lambda r: compute_ratio(model.shape, model.routing_config, r),
        compute=COMPUTE, step=0, mean_over_ranks=lambda value: value,
    )  # fmt: skip
    (complete_args, complete_options), (dynamic_args, _) = recorder.calls
    assert complete_options == {"complete": True}
    assert all(a is b for a, b in zip(complete_args, dynamic_args, strict=True))
    assert (batch.y == 10).any() and not (batch.y == 10).all()


def test_the_complete_branch_is_the_backbones_own_loss_times_the_weight(
    backbone_folder: Path, batch: NoisyBatch
) -> None:
    backbone = load_backbone(backbone_folder)
    model = convert(backbone, DyDiTConfig(open_bias=0.0))
    found = complete_terms(model, OBJECTIVE, batch, WarmupConfig(weight=3.0))
    torch.testing.assert_close(found.total, 3.0 * static_terms(backbone, OBJECTIVE, batch).total)


def test_a_freshly_converted_model_is_at_no_distance_from_its_teacher(
    backbone_folder: Path, batch: NoisyBatch
) -> None:
    backbone = load_backbone(backbone_folder)
    model = convert(backbone, DyDiTConfig())
    with block_outputs(model.dynamic_blocks) as features:
        output = model(batch.x_t, batch.t, batch.y)
    warmup = WarmupConfig(mode="distill", feature_weight=1.0, fraction=0.5)
    found = teacher_terms(output, features, backbone, batch, warmup)
    assert found.parts["loss_distill"] < 1e-10 and found.parts["loss_features"] < 1e-10
    moved = teacher_terms(output + 0.5, [1.1 * tokens for tokens in features], backbone, batch, warmup)
    torch.testing.assert_close(moved.parts["loss_distill"], torch.tensor(0.25), rtol=1e-4, atol=0)
    torch.testing.assert_close(moved.parts["loss_features"], torch.tensor(0.01), rtol=1e-4, atol=0)


def test_distillation_is_added_with_its_weights_and_teaches_no_teacher(
    model: DyDiT, backbone_folder: Path, batch: NoisyBatch
) -> None:
    teacher, warmup = load_backbone(backbone_folder), WarmupConfig(weight=0.5, feature_weight=2.0)
    torch.manual_seed(1)
    plain = terms(model, batch)
    torch.manual_seed(1)
    with block_outputs(model.dynamic_blocks) as features:
        taught = terms(
            model, batch, teach=lambda output, b: teacher_terms(output, features, teacher, b, warmup)
        )
    extra = 0.5 * taught.parts["loss_distill"] + 2.0 * taught.parts["loss_features"]
    torch.testing.assert_close(taught.total, plain.total + extra)
    taught.total.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_indecision_is_largest_at_even_odds_and_nothing_for_what_is_certain() -> None:
    even = RoutingLogits(*(torch.zeros(2, 3, 4) for _ in range(3)))
    certain = RoutingLogits(*(torch.full((2, 3, 4), sign * torch.inf) for sign in (1, -1, 1)))
    assert indecision(even) == 1.0 and indecision(certain) == 0.0
    logits = RoutingLogits(*(torch.full((2, 3, 4), 1.0, requires_grad=True) for _ in range(3)))
    indecision(logits).backward()
    assert logits.heads.grad is not None and (logits.heads.grad < 0).all()  # descending opens it further


@given(
    width=st.floats(0.05, 0.95),
    tokens=st.floats(0.05, 0.95),
    away=st.floats(0.1, 10),
    sign=st.sampled_from([-1, 1]),
)
def test_indecision_is_largest_at_the_thresholds(width: float, tokens: float, away: float, sign: int) -> None:
    def at(distance: float) -> float:
        cuts = (logit(width), logit(width), logit(tokens))
        logits = RoutingLogits(*(torch.full((2, 3, 4), cut + distance) for cut in cuts))
        return indecision(logits, width, tokens).item()

    p = 1 / (1 + math.exp(-away))
    assert at(0.0) == pytest.approx(1.0, abs=1e-5)
    assert at(sign * away) == pytest.approx(4 * p * (1 - p), rel=1e-3, abs=1e-6)


def test_the_models_own_thresholds_count(model: DyDiT, batch: NoisyBatch) -> None:
    model.set_thresholds(0.8, 0.3)
    torch.manual_seed(1)
    found = terms(model, batch, decisiveness=0.5, thresholds=(0.8, 0.3))
    torch.manual_seed(1)
    _, routing = model(batch.x_t, batch.t, batch.y, return_routing=True)
    assert found.parts["indecision"] == indecision(routing.logits, 0.8, 0.3) != indecision(routing.logits)


def test_decisiveness_is_added_with_its_weight(model: DyDiT, batch: NoisyBatch) -> None:
    torch.manual_seed(1)
    plain = terms(model, batch)
    torch.manual_seed(1)
    found = terms(model, batch, decisiveness=0.5)
    torch.testing.assert_close(found.total, plain.total + 0.5 * found.parts["indecision"])
    assert "indecision" not in plain.parts


def test_pretraining_without_its_loss_is_refused() -> None:
    message = (
        r"diffusion_weight is 0 for task pretrain; expected more than 0: .*; set it to 1, or leave it out"
    )
    with pytest.raises(ConfigError, match=message):
        RunConfig(
            task="pretrain", output_dir="unused", model={"preset": "DiT-S/2"},
            train={"steps": 1, "diffusion_weight": 0.0},
        )  # fmt: skip
