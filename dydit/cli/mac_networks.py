"""What ``dydit macs`` counts: the networks that a preset, model, run or export stands for, each two ways."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dydit.cli.models import open_dydit, open_model, sampler_defaults
from dydit.compute.analytic import executed_table, masked_table, static_table
from dydit.compute.complete import Complete
from dydit.compute.engine import EngineCall, count_engine
from dydit.compute.on_meta import count_on_meta, like, noise_inputs
from dydit.compute.table import MacTable
from dydit.config import SamplerConfig, find_path
from dydit.diffusion import make_sampler
from dydit.dynamic.dydit import DyDiT
from dydit.errors import ConfigError, DyditError
from dydit.export.artefact import is_artefact
from dydit.export.schedule import SubnetSchedule
from dydit.models.dit import DiT
from dydit.models.presets import PRESETS
from dydit.runtime.engine import SubnetEngine
from dydit.shapes import ModelShape

# DiT-XL/2 and whatever else is meant as a preset; a misspelt one is then told with the nearest.
_PRESET = re.compile(r"DiT-\w+/\d+")
# Text of a preset with adaln_single, as in PixArt-α: T5-XXL's width, and the length it is cut to.
_TEXT = {"context_dim": 4096, "context_length": 120}
_WEIGHTS = "config.json"  # of an export that has some


@dataclass(frozen=True)
class Step:
    """One timestep of an engine: shares of heads and MLP groups that are on, and of tokens that were kept."""

    timestep: float
    heads: float
    groups: float
    tokens: float


@dataclass(frozen=True)
class NetworkMacs:
    """Compute of one network for one image and one forward, by closed form and counted.

    Attributes:
        name: which network.
        conditions: what the figures hold for.
        analytic: one table per timestep, or a single one where all timesteps cost the same.
        counted: the same by fvcore; None where there was nothing to run.
        unsupported: operators without a rule -> how often they ran; ``counted`` then reads low.
        steps: what each timestep of an engine runs; empty where all timesteps cost the same.
    """

    name: str
    conditions: str
    analytic: tuple[MacTable, ...]
    counted: tuple[MacTable, ...] | None
    unsupported: dict[str, int] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    @property
    def mean_macs(self) -> float:
        """Mean over the timesteps, by closed form."""
        return sum(table.total for table in self.analytic) / len(self.analytic)

    @property
    def differences(self) -> list[str]:
        """Where counted and analytic MACs differ; operators that were not counted are such places too."""
        found = [f"{operator} ran {count} times, uncounted" for operator, count in self.unsupported.items()]
        for i, counted in enumerate(self.counted or ()):
            at = f"timestep {self.steps[i].timestep:g}, " if self.steps else ""
            found += [f"{at}{place}" for place in self.analytic[i].differences(counted)]
        return found

    def check(self) -> None:
        """Refuse figures that are not exact.

        Raises:
            DyditError: counted and analytic MACs differ.
        """
        if found := self.differences:
            raise DyditError(
                f"{self.name}: analytic and counted MACs differ in {len(found)} places: {found[0]}",
                expected="equal figures",
                remedy="report it with this command line",
            )


def is_preset(model: str) -> bool:
    """Whether a preset is meant, be it a misspelt one."""
    return bool(_PRESET.fullmatch(model)) and not Path(model).exists()


def preset_macs(
    name: str, sample_size: int | tuple[int, int] | None, conditioning: str | None
) -> tuple[ModelShape, NetworkMacs]:
    """A preset's shape and compute.

    Args:
        sample_size: latent size; None: 32, an image of 256 px.
        conditioning: design of the conditioning; None: adaln_zero.

    Raises:
        ConfigError, ShapeError: there is no such preset, size or design.
    """
    design = conditioning or "adaln_zero"
    text = _TEXT if design == "adaln_single" else {}
    build = partial(
        DiT.from_preset,
        name,
        sample_size=32 if sample_size is None else sample_size,
        conditioning=design,
        **text,
    )
    with torch.device("meta"):
        shape = build().shape
    return shape, _dense(name, "every head, group and token", static_table(shape), build)


def all_preset_macs(
    sample_size: int | tuple[int, int] | None, conditioning: str | None
) -> list[tuple[ModelShape, NetworkMacs]]:
    """Every preset, smallest first within its size.

    Raises:
        ShapeError: there is no such size or design.
    """
    presets = tqdm(PRESETS, desc="counting", unit="preset")
    return [preset_macs(name, sample_size, conditioning) for name in presets]


def model_macs(model: str, schedule: Path | None) -> tuple[ModelShape, list[NetworkMacs]]:
    """Shape and networks of a model: the static one; of a DyDiT also the masked one and, where timesteps are
    known from an export or from a run's sampler, the engine.

    Args:
        model: a checkpoint, a model's, run's or export's folder, or a Hub id.
        schedule: export folder to run with the model; None: the model's own, if it is an export or a run.

    Raises:
        CheckpointError, ScheduleError: what was given cannot be used.
    """
    folder = Path(find_path(model))
    if schedule is None and is_artefact(folder):
        schedule = folder
        if not (folder / _WEIGHTS).is_file():
            return _schedule_alone(SubnetSchedule.load(folder))
    plan = None if schedule is None else SubnetSchedule.load(schedule)
    network = open_model(model) if plan is None else open_dydit(model)
    if isinstance(network, DiT):
        every = "every head, group and token"
        return network.shape, [_dense("static model", every, static_table(network.shape), like(network))]
    if plan is None and (sampler := sampler_defaults(model)):
        timesteps = make_sampler(SamplerConfig(**sampler), network.shape.learn_sigma).timesteps
        plan = SubnetSchedule.from_model(network, timesteps, sampler)
    return network.shape, [*_dense_forms(network), *([] if plan is None else [_engine(network, plan)])]


def need_steps(networks: Sequence[NetworkMacs]) -> list[NetworkMacs]:
    """The networks whose timesteps differ.

    Raises:
        ConfigError: there is none.
    """
    found = [network for network in networks if network.steps]
    if not found:
        raise ConfigError(
            "--by timestep where every timestep costs the same",
            expected="an export or a run",
            remedy="give --schedule, or choose --by part",
        )
    return found


def _dense(name: str, conditions: str, analytic: MacTable, build: Callable[[], Any]) -> NetworkMacs:
    report = count_on_meta(build)
    return NetworkMacs(name, conditions, (analytic,), (report.table,), report.unsupported)


def _dense_forms(model: DyDiT) -> list[NetworkMacs]:
    build = like(model)
    return [
        _dense(
            "static backbone",
            "every head, group and token",
            static_table(model.shape),
            lambda: Complete(build()),
        ),
        _dense(
            "DyDiT as trained",
            "masks multiply, so everything runs, and the routers too",
            masked_table(model.shape, model.routing_config),
            build,
        ),
    ]


def _engine(model: DyDiT, plan: SubnetSchedule) -> NetworkMacs:
    """The deployed form on one image of noise, at every timestep; on the GPU if there is one."""
    engine = SubnetEngine(model, plan).to("cuda" if torch.cuda.is_available() else "cpu")
    weight = next(model.parameters())
    x, y = noise_inputs(model.shape, weight.dtype, weight.device)
    calls: list[EngineCall] = [
        count_engine(engine, x, t, y) for t in tqdm(plan.timesteps, desc="counting", unit="timestep")
    ]
    unsupported: Counter[str] = Counter()
    for call in calls:
        unsupported.update(call.counted.unsupported)
    return NetworkMacs(
        "engine",
        f"sliced; mean of {len(calls)} timesteps, each on one image of noise (seed 0), "
        "on which the tokens kept depend",
        tuple(call.analytic for call in calls),
        tuple(call.counted.table for call in calls),
        dict(unsupported),
        _steps(plan, np.concatenate([call.kept_tokens for call in calls])),
    )


def _schedule_alone(plan: SubnetSchedule) -> tuple[ModelShape, list[NetworkMacs]]:
    """By closed form only: a schedule holds no weights, so nothing can be run and no token be left out."""
    every = np.full((len(plan.timesteps), plan.shape.depth), plan.shape.tokens)
    tables = tuple(
        executed_table(plan.shape, plan.routing, heads[None], groups[None], tokens[None])
        for heads, groups, tokens in zip(plan.heads.sum(-1), plan.groups.sum(-1), every, strict=True)
    )
    return plan.shape, [
        NetworkMacs(
            "static backbone", "every head, group and token", (static_table(plan.shape),), counted=None
        ),
        NetworkMacs(
            "engine",
            f"sliced; mean of {len(tables)} timesteps with every token kept: an upper bound, "
            "as no model was given to leave tokens out",
            tables,
            counted=None,
            steps=_steps(plan, every),
        ),
    ]


def _steps(plan: SubnetSchedule, kept: np.ndarray) -> tuple[Step, ...]:
    """Facts of each timestep, with the tokens kept (S, L)."""
    shares = (plan.heads.mean((1, 2)), plan.groups.mean((1, 2)), kept.mean(1) / plan.shape.tokens)
    return tuple(Step(*(float(f) for f in facts)) for facts in zip(plan.timesteps, *shares, strict=True))
