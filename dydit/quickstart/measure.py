"""What ``dydit quickstart`` measures: compute, time, quality and the two promises, on one set of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dydit.compute.analytic import executed_macs
from dydit.compute.latency import measure_interleaved
from dydit.diffusion import Sampler
from dydit.dynamic.dydit import DyDiT
from dydit.evaluation.calls import (
    Call,
    count_calls,
    keep_maps,
    kept_share,
    largest_difference,
    record_calls,
    route_calls,
)
from dydit.evaluation.digit_classifier import load_digit_split, train_digit_classifier
from dydit.evaluation.digit_quality import DigitQuality, digit_quality, real_digit_quality
from dydit.export.schedule import SubnetSchedule
from dydit.models.dit import DiT
from dydit.report.summary import ComputeResult, EquivalenceCheck, QualityRow, TimeResult
from dydit.routing.routing import Routing
from dydit.runtime.engine import SubnetEngine

BATCH = 64  # images per call where compute is counted and time is measured
QUALITY_SAMPLES, QUALITY_BATCH = 500, 100
GRID_PER_CLASS = 8
TIMING_ROUNDS = 7
PICTURES, PICTURE_STEPS = 5, 6
CHECK_TOLERANCE = 1e-5
EXACT = 1e-15  # no MAC more or less; a tolerance must be above 0


@dataclass(frozen=True)
class Subject:
    """The static backbone, the trained model and its engine, with the inputs of all measurements."""

    backbone: DiT
    model: DyDiT
    engine: SubnetEngine
    sampler: Sampler
    seed: int

    def inputs(self, count: int) -> tuple[Tensor, Tensor]:
        """Noise (count, C, height, width) and labels (count,), classes in turn; the same for every model."""
        shape = self.model.shape
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(count, shape.in_channels, *shape.sample_size, generator=generator)
        return noise, torch.arange(count) % shape.num_classes

    @cached_property
    def calls(self) -> list[Call]:
        """Every call of one sampling run of the engine, ``BATCH`` images."""
        return record_calls(self.sampler, self.engine, *self.inputs(BATCH))[1]

    @cached_property
    def routings(self) -> list[Routing]:
        """What the trained model decides in those calls."""
        return route_calls(self.model, self.calls)


def compute_of(subject: Subject) -> ComputeResult:
    """MACs per image and sampling step, counted on what the backbone and the engine executed."""
    static = count_calls(subject.backbone, subject.calls[:1])  # the same in every call
    dynamic = count_calls(subject.engine, subject.calls)
    unsupported: dict[str, int] = {}
    for report in (*static, *dynamic):
        for name, count in report.unsupported.items():
            unsupported[name] = unsupported.get(name, 0) + count
    return ComputeResult(
        static_macs=static[0].total / BATCH,
        engine_macs=tuple(r.total / BATCH for r in dynamic),
        unsupported=unsupported,
    )


def checks_of(subject: Subject, compute: ComputeResult) -> list[EquivalenceCheck]:
    """The two promises, on this very model: sliced equals masked, reported equals executed."""
    model = subject.model
    counted = np.asarray(compute.engine_macs) * BATCH
    analytic = np.asarray([
        executed_macs(model.shape, model.routing_config, routing).sum().item() for routing in subject.routings
    ])  # fmt: skip
    return [
        EquivalenceCheck(
            name="sliced engine and masked model",
            max_relative_difference=largest_difference(
                subject.engine, subject.model, subject.calls
            ),
            tolerance=CHECK_TOLERANCE,
        ),
        EquivalenceCheck(
            name="counted and analytic MACs of the engine",
            max_relative_difference=float(np.max(np.abs(counted - analytic) / analytic)),
            tolerance=EXACT,
        ),
    ]  # fmt: skip


def time_of(subject: Subject) -> TimeResult:
    """Whole sampling runs of both, taking turns: milliseconds per sampling step of ``BATCH`` images."""
    noise, labels = subject.inputs(BATCH)
    steps = len(subject.sampler.timesteps)

    def run(model: Any) -> Any:
        return lambda: subject.sampler.sample(model, noise, labels, subject.model.null_label)

    times = measure_interleaved(
        {"static": run(subject.backbone), "engine": run(subject.engine)}, rounds=TIMING_ROUNDS, warmup=1
    )
    per_step = {name: tuple(ms / steps for ms in values) for name, values in times.items()}
    return TimeResult(static_ms=per_step["static"], engine_ms=per_step["engine"])


def quality_of(
    subject: Subject, control: DyDiT | None = None
) -> tuple[tuple[QualityRow, ...], dict[str, np.ndarray]]:
    """Quality of samples from the same noise, and the first of them as arrays for the picture.

    Args:
        subject: what is measured.
        control: the static model after equally long fine-tuning; None leaves its row out.
    """
    split = load_digit_split()
    classifier = train_digit_classifier(split)
    models = {
        "backbone": ("static backbone", subject.backbone),
        "dydit": ("DyDiT, sliced engine", subject.engine),
        "control": ("static backbone, fine-tuned as long", control),
    }
    labels = subject.inputs(QUALITY_SAMPLES)[1]
    rows = [_row("real", "held-out real digits", real_digit_quality(classifier, split, QUALITY_SAMPLES))]
    samples = {}
    for role, (label, model) in models.items():
        if model is not None:
            samples[role] = _samples(subject, model)
            rows.append(_row(role, label, digit_quality(classifier, split, samples[role], labels)))
    shown = subject.model.shape.num_classes * GRID_PER_CLASS
    arrays = {f"{role}_samples": samples[role][:shown].numpy() for role in ("backbone", "dydit")}
    return tuple(rows), {**arrays, "sample_labels": labels[:shown].numpy()}


def schedule_arrays(subject: Subject) -> dict[str, np.ndarray]:
    """Width and kept tokens per timestep, and where in a few images tokens are kept."""
    schedule: SubnetSchedule = subject.engine.schedule
    chosen = np.linspace(0, len(subject.calls) - 1, PICTURE_STEPS).round().astype(int)
    images = np.stack([subject.calls[i].x[:PICTURES].numpy() for i in chosen])
    return {
        "timesteps": np.asarray(schedule.timesteps),
        "heads": schedule.heads,
        "groups": schedule.groups,
        "tokens_kept": kept_share(subject.routings),
        "keep_timesteps": np.asarray([float(subject.calls[i].t) for i in chosen]),
        "keep_images": images,
        "keep_maps": keep_maps([subject.routings[i] for i in chosen], PICTURES, subject.model.shape.grid),
    }


def _samples(subject: Subject, model: Any) -> Tensor:
    noise, labels = subject.inputs(QUALITY_SAMPLES)
    parts = zip(noise.split(QUALITY_BATCH), labels.split(QUALITY_BATCH), strict=True)
    return torch.cat([subject.sampler.sample(model, n, y, subject.model.null_label) for n, y in parts])


def _row(role: Any, label: str, quality: DigitQuality) -> QualityRow:
    conditions = f"{quality.num_samples} images against {quality.num_reference} real ones"
    return QualityRow(role=role, label=label, metrics=quality.metrics(), conditions=conditions)
