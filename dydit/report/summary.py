"""What a report knows about one run: frozen, validated, nothing derived is stored.

Ratios, medians and shares are computed from the measured values whenever they are asked for, so a
report cannot contradict itself. A value that was not measured is None and is shown as a dash.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, field_validator, model_validator

from dydit.errors import DataError
from dydit.evaluation.quality import Metric


class _Frozen(BaseModel):
    # NaN is not a result: what could not be measured is None.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Conditions(_Frozen):
    """Under which conditions everything in the summary was obtained.

    Attributes:
        model: the architecture in words, e.g. ``"DiT, 6 blocks, 96 wide, 6 heads, patch 2"``.
        dataset: what it was fine-tuned on, in words.
        target_ratio: λ, the compute ratio aimed at, in (0, 1].
        training_steps: optimiser steps of fine-tuning.
        seed: of training and sampling.
        sampler: its name, e.g. ``"ddim"``.
        sampling_steps: S.
        guidance_scale: 1 means none.
        batch_size: images per call where compute was counted and time measured.
        threads: CPU threads of the measurement; None on a GPU.
        processor: name of the CPU or GPU.
        dtype: of the weights in the measurement.
        torch_version, dydit_version: of the software.
        command: the line that makes this run again.
    """

    model: str
    dataset: str
    target_ratio: float = Field(gt=0, le=1)
    training_steps: int | None = Field(default=None, ge=0)
    seed: int
    sampler: str
    sampling_steps: int = Field(ge=1)
    guidance_scale: float
    batch_size: int = Field(ge=1)
    threads: int | None = None
    processor: str | None = None
    dtype: str = "float32"
    torch_version: str
    dydit_version: str
    command: str | None = None


class ComputeResult(_Frozen):
    """Executed MACs per image and sampling step (both halves where guidance doubles the batch).

    Attributes:
        static_macs: of the static backbone.
        engine_macs: (S,) of the sliced engine at each sampling timestep, in sampling order, as the mean
            over the images counted (images keep different tokens); routers included.
        unsupported: operators the counter has no rule for, with their counts. Empty when everything was
            counted, None when nothing was. Not empty means that the MACs are a lower bound.
    """

    static_macs: float | None = Field(default=None, gt=0)
    engine_macs: tuple[float, ...] | None = Field(default=None, min_length=1)
    unsupported: dict[str, int] | None = None

    @property
    def engine_mean_macs(self) -> float | None:
        """Mean over the sampling timesteps."""
        return None if self.engine_macs is None else float(np.mean(self.engine_macs))

    @property
    def ratio(self) -> float | None:
        """Executed / static MACs, over a whole sampling run."""
        if self.static_macs is None or self.engine_mean_macs is None:
            return None
        return self.engine_mean_macs / self.static_macs

    @property
    def ideal_speedup(self) -> float | None:
        """1 / ratio: the speed-up if time followed the MACs exactly."""
        return None if self.ratio is None else 1.0 / self.ratio


class TimeResult(_Frozen):
    """Measured wall-clock time, static backbone and engine taking turns.

    Attributes:
        static_ms, engine_ms: one value per round, paired: milliseconds per sampling step of one batch,
            averaged over the whole schedule (timesteps differ in width, so all of them must count).
    """

    static_ms: tuple[float, ...] | None = Field(default=None, min_length=1)
    engine_ms: tuple[float, ...] | None = Field(default=None, min_length=1)

    @field_validator("static_ms", "engine_ms")
    @classmethod
    def _times_are_positive(cls, times: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if times is not None and min(times) <= 0:
            raise ValueError("a time of zero or less; a value that was not measured is None")
        return times

    @model_validator(mode="after")
    def _rounds_are_paired(self) -> TimeResult:
        if self.static_ms and self.engine_ms and len(self.static_ms) != len(self.engine_ms):
            raise ValueError(
                f"{len(self.static_ms)} static rounds beside {len(self.engine_ms)} engine rounds"
            )
        return self

    @property
    def static_median_ms(self) -> float | None:
        return None if self.static_ms is None else float(np.median(self.static_ms))

    @property
    def engine_median_ms(self) -> float | None:
        return None if self.engine_ms is None else float(np.median(self.engine_ms))

    @property
    def speedup_quartiles(self) -> tuple[float, float, float] | None:
        """(lower quartile, median, upper quartile) of static/engine time, paired round by round."""
        if self.static_ms is None or self.engine_ms is None:
            return None
        low, median, high = np.percentile(np.divide(self.static_ms, self.engine_ms), [25, 50, 75])
        return float(low), float(median), float(high)

    @property
    def speedup(self) -> float | None:
        """Median of the paired speed-ups."""
        return None if self.speedup_quartiles is None else self.speedup_quartiles[1]


class QualityRow(_Frozen):
    """Quality of one set of images.

    Attributes:
        role: ``real`` images measured like samples; the static ``backbone``; ``dydit`` through the engine;
            ``control``: the static backbone fine-tuned for equally many steps.
        label: how the row is called in the report.
        metrics: in the order they are shown; every row of a summary has the same names.
        conditions: how many images, compared with what, from which noise.
    """

    role: Literal["real", "backbone", "dydit", "control"]
    label: str
    metrics: tuple[Metric, ...]
    conditions: str

    @field_validator("metrics")
    @classmethod
    def _values_are_finite(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        for metric in metrics:
            if metric.value is not None and not np.isfinite(metric.value):
                raise ValueError(f"{metric.name} is {metric.value}; a value that was not measured is None")
        return metrics


class EquivalenceCheck(_Frozen):
    """Two things that must agree: forms of the network that compute one function, or counts of its MACs.

    Attributes:
        name: e.g. ``"sliced engine and masked model"``.
        max_relative_difference: of the outputs or counts; None when not checked.
        tolerance: what counts as equal.
    """

    name: str
    max_relative_difference: float | None = Field(default=None, ge=0)
    tolerance: float = Field(default=1e-5, gt=0)

    @property
    def passed(self) -> bool | None:
        if self.max_relative_difference is None:
            return None
        return self.max_relative_difference <= self.tolerance


class CurvePoint(_Frozen):
    """One logged training step; a value that was not logged, or not finite, is left out of the curve.

    Attributes:
        step: optimiser steps done.
        loss: diffusion loss.
        ratio_train: executed / static MACs under training noise (sampled masks).
        ratio_eval: the same with thresholded masks, as exported.
        target: the ratio asked for at this step (it ramps from 1 to λ).
    """

    step: int = Field(ge=0)
    loss: float | None = None
    ratio_train: float | None = None
    ratio_eval: float | None = None
    target: float | None = None

    @field_validator("loss", "ratio_train", "ratio_eval", "target", mode="before")
    @classmethod
    def _left_out_where_not_finite(cls, value: float | None) -> float | None:
        return value if value is None or np.isfinite(value) else None


FloatArray = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SummaryArrays:
    """The arrays of a summary; a group that was not recorded is None as a whole.

    Attributes:
        timesteps: (S,) in sampling order. heads: (S, L, H) bool, groups: (S, L, G) bool: what is active.
        tokens_kept: (S, L) fraction of tokens whose MLP runs, mean over the images.
        keep_timesteps: (S',) of the pictures. keep_images: (S', K, C, height, width), the x_t of K example
            images. keep_maps: (S', K, rows, columns), fraction of blocks in which each token is kept.
        backbone_samples, dydit_samples: (n, C, height, width) in [−1, 1], from the same noise.
        sample_labels: (n,) the classes they were drawn for.

    Raises:
        DataError: shapes that do not belong together, or half a group.
    """

    timesteps: NDArray[np.float64] | None = None
    heads: NDArray[np.bool_] | None = None
    groups: NDArray[np.bool_] | None = None
    tokens_kept: FloatArray | None = None
    keep_timesteps: NDArray[np.float64] | None = None
    keep_images: FloatArray | None = None
    keep_maps: FloatArray | None = None
    backbone_samples: FloatArray | None = None
    dydit_samples: FloatArray | None = None
    sample_labels: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        self._check("timesteps (S) heads (S,L,H) groups (S,L,G)")
        self._check("timesteps (S) heads (S,L,H) tokens_kept (S,L)", optional="tokens_kept")
        self._check("keep_timesteps (T) keep_images (T,K,C,h,w) keep_maps (T,K,r,c)")
        self._check("backbone_samples (n,C,h,w) dydit_samples (n,C,h,w) sample_labels (n)")

    def present(self) -> dict[str, np.ndarray]:
        """The arrays that were recorded, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in named.items() if array is not None}

    def _check(self, legend: str, optional: str = "") -> None:
        """Compare shapes with a legend such as ``"a (S) b (S,L)"``: equal letters are equal sizes."""
        words = legend.split()
        group = {
            name: shape.strip("()").split(",") for name, shape in zip(words[::2], words[1::2], strict=True)
        }
        missing = [name for name in group if getattr(self, name) is None]
        if optional in missing or len(missing) == len(group):
            return
        if missing:
            raise DataError(
                f"report arrays without {', '.join(missing)}", expected=f"all of {legend}, or none"
            )
        sizes: dict[str, int] = {}
        for name, letters in group.items():
            shape = getattr(self, name).shape
            fits = len(shape) == len(letters) and all(
                sizes.setdefault(letter, size) == size for letter, size in zip(letters, shape, strict=True)
            )
            if not fits:
                raise DataError(f"report array {name} has shape {shape}", expected=f"shapes {legend}")


class Summary(_Frozen):
    """Everything a report shows. ``arrays`` is stored beside the JSON, the rest in it.

    Attributes:
        title: first line of the page.
        conditions: of everything below.
        quality: rows in the order shown.
        checks: the equivalences that were tested on this very model.
        training: the logged curve, oldest first.
        notes: further sentences a reader needs, shown under the headline.
    """

    title: str = "DyDiT report"
    conditions: Conditions
    compute: ComputeResult = ComputeResult()
    time: TimeResult = TimeResult()
    quality: tuple[QualityRow, ...] = ()
    checks: tuple[EquivalenceCheck, ...] = ()
    training: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()
    arrays: InstanceOf[SummaryArrays] = Field(default_factory=SummaryArrays, exclude=True, repr=False)

    @model_validator(mode="after")
    def _parts_agree(self) -> Summary:
        steps, macs = self.arrays.timesteps, self.compute.engine_macs
        if steps is not None and macs is not None and len(steps) != len(macs):
            raise ValueError(f"engine_macs for {len(macs)} timesteps beside a schedule of {len(steps)}")
        names = {tuple(metric.name for metric in row.metrics) for row in self.quality}
        if len(names) > 1:
            raise ValueError("quality rows with different metrics")
        return self

    @property
    def realised_share(self) -> float | None:
        """Measured speed-up / ideal speed-up."""
        if self.time.speedup is None or self.compute.ideal_speedup is None:
            return None
        return self.time.speedup / self.compute.ideal_speedup
