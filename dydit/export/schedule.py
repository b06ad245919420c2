"""SubnetSchedule: one static subnetwork per sampling timestep.

The width of a DyDiT depends on the timestep alone, so it is known before any sampling. The schedule holds
it as rows of distinct (head mask, group mask) pairs and, per timestep and block, the index of its row;
timesteps that share a subnetwork share its packed weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dydit.config import DyDiTConfig
from dydit.costs import outer_macs
from dydit.dynamic.compute_loss import deployed_cost
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ScheduleError
from dydit.export.artefact import read_artefact, write_artefact
from dydit.export.fingerprint import weights_sha256
from dydit.export.logits import timestep_logits
from dydit.routing.gates import threshold_gate
from dydit.shapes import ModelShape


@dataclass(frozen=True, eq=False)
class SubnetSchedule:
    """Subnetworks of a model for a sampler's timesteps.

    Attributes:
        timesteps: (S,) in the sampler's order, in the model's units (0..1000).
        head_rows, group_rows: distinct masks, bool (U, H) and (U, G); row u is one pair.
        rows: index (S, L) of each timestep's and block's pair.
        shape: the model's shape.
        routing: how the model routes; its token threshold is part of the subnetwork.
        weights: sha256 of the weights the schedule was made from.
        sampler: settings of the sampler, for the record and for ``dydit sample``.
        capacities: tokens per sample that enter the MLP in capacity mode, int32 (S, L); None: not chosen.
        calibration: how thresholds and capacities were found, plain JSON values; empty: not searched.

    Raises:
        ScheduleError: the capacities do not fit.
    """

    timesteps: tuple[float, ...]
    head_rows: np.ndarray
    group_rows: np.ndarray
    rows: np.ndarray
    shape: ModelShape
    routing: DyDiTConfig
    weights: str
    sampler: dict[str, Any] = field(default_factory=dict)
    capacities: np.ndarray | None = None
    calibration: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.capacities is not None:
            _check_capacities(self.capacities, len(self.timesteps), self.shape, self.routing)

    @classmethod
    def from_model(
        cls,
        model: DyDiT,
        timesteps: Sequence[float] | torch.Tensor,
        sampler: dict[str, Any] | None = None,
        capacities: np.ndarray | None = None,
        calibration: dict[str, Any] | None = None,
        weights: str | None = None,
    ) -> SubnetSchedule:
        """Read the subnetworks of ``model`` at ``timesteps`` (S,) off its width routers.

        Args:
            sampler, capacities, calibration: kept as they are (see the attributes).
            weights: likewise; None: the sha256 is taken here, which reads all weights.

        Raises:
            ScheduleError: no timestep, or one twice, capacities that do not fit, or a router that gives NaN
                (names it and its block).
        """
        steps = [float(t) for t in timesteps]
        if not np.isfinite(steps).all():
            raise ScheduleError(f"timesteps {steps}", expected="numbers", remedy="give those of a sampler")
        distinct_steps = {_key(t) for t in steps}
        if not steps or len(distinct_steps) != len(steps):
            raise ScheduleError(
                f"{len(steps)} timesteps, {len(distinct_steps)} of them distinct in float32",
                expected="at least one, each once",
                remedy="give a sampler's timesteps with dict.fromkeys, or fewer steps if two fall together",
            )
        heads, groups = _width_masks(model, steps)
        pairs = np.concatenate([heads, groups], axis=-1)  # (S, L, H+G)
        distinct, index = np.unique(pairs.reshape(-1, pairs.shape[-1]), axis=0, return_inverse=True)
        H = model.shape.num_heads
        return cls(
            timesteps=tuple(steps),
            head_rows=distinct[:, :H],
            group_rows=distinct[:, H:],
            rows=index.reshape(pairs.shape[:2]).astype(np.int32),
            shape=model.shape,
            routing=model.routing_config,
            weights=weights_sha256(model) if weights is None else weights,
            sampler=dict(sampler or {}),
            capacities=None if capacities is None else _as_int32(capacities),
            calibration=dict(calibration or {}),
        )

    @property
    def heads(self) -> np.ndarray:
        """Head masks, bool (S, L, H)."""
        return self.head_rows[self.rows]

    @property
    def groups(self) -> np.ndarray:
        """Group masks, bool (S, L, G)."""
        return self.group_rows[self.rows]

    @cached_property
    def subnetworks_by_block(self) -> tuple[int, ...]:
        """Number of distinct subnetworks of each block (L,)."""
        return tuple(len(np.unique(self.rows[:, block])) for block in range(self.shape.depth))

    @cached_property
    def view_share(self) -> float:
        """Share of (timestep, block) pairs whose active heads and active groups are one run each, or none.

        Their slices are views of the weights: nothing is copied.
        """
        is_view = is_one_run(self.head_rows) & is_one_run(self.group_rows)  # (U,)
        return float(is_view[self.rows].mean())

    def index_of(self, timestep: float) -> int:
        """Position of a timestep in the schedule.

        Raises:
            ScheduleError: the schedule does not hold it.
        """
        position = self._positions.get(_key(timestep))
        if position is None:
            raise ScheduleError(
                f"timestep {timestep:g}",
                expected=f"one of the schedule's {len(self.timesteps)} ({_abridged(self.timesteps)})",
                remedy="export again for the sampler and number of steps that you sample with",
            )
        return position

    def macs_per_timestep(self, kept_tokens: np.ndarray | None = None) -> np.ndarray:
        """MACs per sample at each timestep (S,), as the engine executes them, without what fills batches up.

        Args:
            kept_tokens: mean number of kept tokens (S, L), ``capacities`` for capacity mode; None = all of
                them, the upper bound.
        """
        tokens = self.shape.tokens if kept_tokens is None else kept_tokens
        cost = deployed_cost(self.shape, self.routing)
        blocks = cost.executed(self.heads.sum(-1), self.groups.sum(-1), tokens)  # (S, L)
        return outer_macs(self.shape) + blocks.sum(-1)

    def save(self, folder: str | Path) -> None:
        """Write ``schedule.safetensors`` and ``manifest.json`` into a folder, beside what is there.

        Raises:
            OutputError: the folder cannot be written.
        """
        tensors = {
            "head_rows": np.packbits(self.head_rows, axis=-1),
            "group_rows": np.packbits(self.group_rows, axis=-1),
            "rows": self.rows,
        }
        if self.capacities is not None:
            tensors["capacities"] = self.capacities
        write_artefact(folder, tensors, self.manifest)

    @classmethod
    def load(cls, folder: str | Path) -> SubnetSchedule:
        """Read what ``save`` wrote.

        Raises:
            ScheduleError: a file is missing or was changed, or the two do not belong together.
        """
        tensors, manifest = read_artefact(folder)
        try:
            return cls._from_artefact(tensors, manifest)
        except (KeyError, TypeError, ValueError) as error:
            raise ScheduleError(
                f"{folder} holds a broken schedule ({error!r})", remedy="export again"
            ) from error

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``manifest.json`` says of this schedule, all of it plain JSON values."""
        return {
            "architecture": "DyDiT",
            "shape": asdict(self.shape) | {"sample_size": list(self.shape.sample_size)},
            "routing": self.routing.model_dump(),
            "timesteps": list(self.timesteps),
            "sampler": self.sampler,
            "thresholds": {"width": self.routing.threshold, "tokens": self.routing.token_threshold},
            "subnetworks_by_block": list(self.subnetworks_by_block),
            "macs_per_timestep_all_tokens": [int(m) for m in self.macs_per_timestep()],
            "macs_per_timestep_at_capacity": None
            if self.capacities is None
            else [int(m) for m in self.macs_per_timestep(self.capacities)],
            "view_share": self.view_share,
            "calibration": self.calibration,
            "weights_sha256": self.weights,
        }

    @classmethod
    def _from_artefact(cls, tensors: dict[str, np.ndarray], manifest: dict[str, Any]) -> SubnetSchedule:
        shape = ModelShape(**{**manifest["shape"], "sample_size": tuple(manifest["shape"]["sample_size"])})
        schedule = cls(
            timesteps=tuple(manifest["timesteps"]),
            head_rows=np.unpackbits(tensors["head_rows"], axis=-1, count=shape.num_heads).astype(bool),
            group_rows=np.unpackbits(tensors["group_rows"], axis=-1, count=shape.mlp_groups).astype(bool),
            rows=tensors["rows"],
            shape=shape,
            routing=DyDiTConfig(**manifest["routing"]),
            weights=manifest["weights_sha256"],
            sampler=manifest["sampler"],
            # Schedules of earlier versions have neither.
            capacities=tensors.get("capacities"),
            calibration=dict(manifest.get("calibration", {})),
        )
        if schedule.rows.shape != (len(schedule.timesteps), shape.depth):
            raise ValueError(f"rows of shape {schedule.rows.shape}")
        if schedule.rows.min() < 0 or schedule.rows.max() >= len(schedule.head_rows):
            raise ValueError("a row index out of range")
        return schedule

    @cached_property
    def _positions(self) -> dict[float, int]:
        return {_key(t): i for i, t in enumerate(self.timesteps)}


def _width_masks(model: DyDiT, timesteps: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Deployed masks of heads (S, L, H) and groups (S, L, G): thresholded, without noise."""
    logits = timestep_logits(model, timesteps)
    threshold = model.routing_config.threshold
    heads, groups = (threshold_gate(values, threshold).bool().cpu().numpy() for values in logits)
    return heads, groups


def is_one_run(masks: np.ndarray) -> np.ndarray:
    """Whether each mask (U, K) is on in at most one contiguous run: bool (U,)."""
    starts = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    return starts.sum(-1) <= 1


def _as_int32(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers of any width as int32; what is none, or too large, stays as it is."""
    array = np.asarray(numbers)
    fits = np.issubdtype(array.dtype, np.integer) and np.array_equal(array, array.astype(np.int32))
    return array.astype(np.int32) if fits else array


def _check_capacities(capacities: np.ndarray, steps: int, shape: ModelShape, routing: DyDiTConfig) -> None:
    """Refuse capacities that no engine could run.

    Raises:
        ScheduleError: not int32 (S, L), outside of 0..N, or below N in a model that routes no tokens.
    """
    N, expected = shape.tokens, (steps, shape.depth)
    if capacities.shape != expected or capacities.dtype != np.int32:
        raise ScheduleError(
            f"capacities of shape {capacities.shape} and type {capacities.dtype}",
            expected=f"int32 {expected}",
            remedy="give one for each timestep and block, or export with --capacity",
        )
    low, high = capacities.min(), capacities.max()
    if low < 0 or high > N:
        raise ScheduleError(
            f"capacities from {low} to {high}",
            expected=f"0 to {N} tokens",
            remedy="clip them, or export with --capacity",
        )
    if low < N and not routing.token_routing:
        raise ScheduleError(
            f"a capacity of {low} tokens for a model without token routers",
            expected=f"all {N} of them",
            remedy="leave the capacities out",
        )


def _key(timestep: float) -> float:
    """Timesteps are looked up as float32, which is what reaches a model."""
    return float(np.float32(timestep))


def _abridged(timesteps: tuple[float, ...]) -> str:
    if len(timesteps) <= 6:
        return ", ".join(f"{t:g}" for t in timesteps)
    return f"{timesteps[0]:g}, {timesteps[1]:g}, … {timesteps[-1]:g}"
