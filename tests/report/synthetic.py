"""A made-up run with plausible values: reports are tested on it without a model. Not a result."""

from __future__ import annotations

import numpy as np

from dydit.evaluation.quality import Metric
from dydit.report.summary import (
    ComputeResult,
    Conditions,
    CurvePoint,
    EquivalenceCheck,
    QualityRow,
    Summary,
    SummaryArrays,
    TimeResult,
)

STEPS, DEPTH, HEADS, GROUPS, PER_CLASS = 20, 6, 6, 6, 8


def conditions() -> Conditions:
    return Conditions(
        model="DiT, 6 blocks, 96 wide, 6 heads, patch 2",
        dataset="scikit-learn's handwritten digits, 8×8",
        target_ratio=0.5,
        training_steps=300,
        seed=0,
        sampler="ddim",
        sampling_steps=STEPS,
        guidance_scale=1.0,
        batch_size=64,
        threads=2,
        processor="a synthetic processor",
        torch_version="2.15.0",
        dydit_version="0.1.0",
        command="dydit quickstart --seed 0",
    )


def summary() -> Summary:
    """Everything measured."""
    rng = np.random.default_rng(0)
    arrays = _arrays(rng)
    static = 1.07e7
    assert arrays.heads is not None and arrays.groups is not None and arrays.tokens_kept is not None
    share = (
        0.1
        + 0.35 * arrays.heads.mean((1, 2))
        + 0.55 * arrays.groups.mean((1, 2)) * arrays.tokens_kept.mean(1)
    )
    static_ms = 21.0 + rng.gamma(2.0, 0.4, 20)
    return Summary(
        title="DyDiT on handwritten digits (synthetic test data)",
        conditions=conditions(),
        compute=ComputeResult(static_macs=static, engine_macs=tuple(share * static), unsupported={}),
        time=TimeResult(static_ms=tuple(static_ms), engine_ms=tuple(static_ms / rng.normal(1.55, 0.06, 20))),
        quality=(
            _quality("real", "real images, held out", 1.21, 98.5),
            _quality("backbone", "backbone", 2.34, 97.0),
            _quality("dydit", "DyDiT", 2.71, 96.5),
        ),
        checks=(
            EquivalenceCheck(name="converted model, all on, and backbone", max_relative_difference=0.0),
            EquivalenceCheck(name="sliced engine and masked model", max_relative_difference=7.3e-7),
        ),
        training=_training(rng),
        arrays=arrays,
    )


def bare_summary() -> Summary:
    """Nothing measured but the conditions known."""
    return Summary(conditions=conditions())


def _quality(role: str, label: str, frechet: float, accuracy: float) -> QualityRow:
    metrics = (
        Metric("Fréchet distance (digit-classifier features)", frechet, "lower"),
        Metric("class accuracy (digit classifier)", accuracy, "higher", "%"),
    )
    text = "200 images against 898 real ones"
    return QualityRow.model_validate({"role": role, "label": label, "metrics": metrics, "conditions": text})


def _training(rng: np.random.Generator) -> tuple[CurvePoint, ...]:
    points = []
    for step in range(1, 301, 3):
        target = max(0.5, 1 - step / 120)
        ratio = target + 0.12 * np.exp(-step / 90) + rng.normal(0, 0.01)
        points.append(
            CurvePoint(
                step=step,
                loss=0.09 + 0.08 * np.exp(-step / 60) + rng.normal(0, 0.008),
                ratio_train=min(1.0, ratio),
                ratio_eval=min(1.0, ratio + 0.02) if step % 30 == 1 else None,
                target=target,
            )
        )
    return tuple(points)


def _arrays(rng: np.random.Generator) -> SummaryArrays:
    timesteps = np.linspace(999, 0, STEPS).round()
    ease = 0.35 + 0.6 * (1 - timesteps / 999)  # more is active towards the image
    heads = rng.random((STEPS, DEPTH, HEADS)) < ease[:, None, None]
    groups = rng.random((STEPS, DEPTH, GROUPS)) < (0.9 * ease)[:, None, None]
    heads[..., 0] = groups[..., 0] = True
    depth_bias = np.linspace(-0.2, 0.2, DEPTH)
    tokens_kept = np.clip(ease[:, None] + depth_bias, 0.05, 1.0)

    labels = np.repeat(np.arange(10), PER_CLASS)
    images = _pictures(labels, rng)
    keep_timesteps = timesteps[:: STEPS // 7][:8]
    noise = rng.normal(size=(4, 1, 8, 8))
    mix = (keep_timesteps / 999)[:, None, None, None, None]
    clean = images[[0, 24, 40, 72]]
    keep_images = (1 - mix) * clean + mix * noise
    patches = clean.reshape(4, 4, 2, 4, 2).mean(axis=(2, 4)) / 2 + 0.5
    keep_maps = np.clip(0.25 + 0.7 * patches * (1 - mix[..., 0] / 2), 0, 1)
    return SummaryArrays(
        timesteps=timesteps,
        heads=heads,
        groups=groups,
        tokens_kept=tokens_kept,
        keep_timesteps=keep_timesteps,
        keep_images=keep_images.astype(np.float32),
        keep_maps=keep_maps.astype(np.float32),
        backbone_samples=images.astype(np.float32),
        dydit_samples=(images + rng.normal(0, 0.1, images.shape)).astype(np.float32),
        sample_labels=labels,
    )


def _pictures(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rings and bars that differ by class: (n, 1, 8, 8) in [−1, 1]."""
    rows, columns = np.mgrid[0:8, 0:8] - 3.5
    radius = np.hypot(rows, columns)
    angle = labels[:, None, None] * np.pi / 10 + rng.normal(0, 0.05, (len(labels), 1, 1))
    bar = np.abs(rows * np.cos(angle) + columns * np.sin(angle)) < 1.0
    ring = np.abs(radius - 2.6) < 0.8
    drawn = np.where((labels % 2 == 0)[:, None, None], bar | ring, bar & (radius < 4))
    return (2.0 * drawn - 1.0)[:, None]
