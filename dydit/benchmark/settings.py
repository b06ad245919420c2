"""What a benchmark measures, validated once. Imports no torch."""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator
from typing_extensions import Self

from dydit.config.sections import MAX_SEED, PositiveInt, SamplerName, Section
from dydit.errors import ConfigError

Dtype = Literal["fp32", "bf16", "fp16"]
ModeName = Literal["exact", "capacity"]
SweepName = Literal["batch", "tokens", "depth"]
Batch = Annotated[int, Field(ge=1, le=1 << 20)]

SWEPT_BATCHES = (1, 2, 4, 8, 16)
DEFAULT_SAMPLE_SIZE = 32  # latent of a 256 px image
DEFAULT_STEPS = 50


class BenchSettings(Section):
    """Settings of one ``dydit bench``."""

    subject: str = Field(description="a preset's name, or a model as the user named it")
    path: str | None = Field(default=None, description="weights of the model; empty: a preset")
    ratio: float = Field(default=0.5, gt=0, le=1, description="deployed compute of a preset, share of static")
    batches: Annotated[tuple[Batch, ...], Strict(False)] = Field(
        default=(2, 8), min_length=1, description="images per call"
    )
    dtypes: Annotated[tuple[Dtype, ...], Strict(False)] = Field(default=("fp32", "bf16"), min_length=1)
    modes: Annotated[tuple[ModeName, ...], Strict(False)] = Field(default=("exact", "capacity"), min_length=1)
    compile: bool = Field(default=False, description="compile every network")
    rounds: PositiveInt = Field(default=20, description="timed calls of each network")
    whole_run: PositiveInt | None = Field(default=None, description="steps of whole sampling runs")
    whole_rounds: PositiveInt = Field(default=1, description="timed runs of each network")
    sweep: SweepName | None = Field(default=None, description="what grows from case to case")
    memory: bool = Field(default=True, description="measure peak memory in processes of their own")
    memory_budget: PositiveInt | None = Field(default=None, description="bytes; empty: the engine's default")
    schedule: str | None = Field(default=None, description="export folder of the model")
    texts: str | None = Field(default=None, description="file of encoded texts, for a model that takes text")
    depth: PositiveInt | None = Field(default=None, description="blocks of a preset; empty: its own")
    sample_size: PositiveInt | None = Field(
        default=None, description="latent side of a preset; empty: 32, an image of 256 px"
    )
    sampler_defaults: dict[str, Any] = Field(
        default={}, description="sampler of the run that the model comes from, fields of SamplerConfig"
    )
    sampler: SamplerName | None = Field(default=None, description="empty: the model's, or ddim")
    guidance: bool | None = Field(default=None, description="both halves in a call; empty: the sampler's")
    device: Literal["cpu", "cuda"] = "cpu"
    threads: PositiveInt | None = Field(default=None, description="CPU threads; empty: torch's default")
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name, values in (("batch", self.batches), ("dtype", self.dtypes), ("mode", self.modes)):
            if len(set(values)) != len(values):
                raise ConfigError(
                    f"--{name} {','.join(map(str, values))} repeats itself", expected="each value once"
                )
        if self.whole_rounds > 1 and self.whole_run is None:
            raise ConfigError(
                f"--whole-rounds {self.whole_rounds} without --whole-run",
                remedy="add --whole-run STEPS, or leave --whole-rounds out",
            )
        if self.is_preset:
            if self.schedule is not None:
                raise ConfigError(
                    f"--schedule for preset {self.subject}", expected="the model that was exported"
                )
            if self.texts is not None:
                raise ConfigError(f"--texts for preset {self.subject}", expected="a model that takes text")
        elif self.depth is not None or self.sample_size is not None or self.sweep in ("tokens", "depth"):
            raise ConfigError(
                f"--depth, --sample-size, --sweep tokens or --sweep depth for {self.subject}",
                expected="a preset; a model has a size of its own",
            )
        return self

    @property
    def is_preset(self) -> bool:
        """Whether the subject is made, not loaded."""
        return self.path is None

    @property
    def command(self) -> str:
        """The command line that measures this again, options at their defaults left out."""
        words = ["dydit", "bench", self.subject]
        for name in ("ratio", "depth", "sample_size", "schedule", "texts", "sampler", "guidance", "batches",
                     "dtypes", "modes", "compile", "rounds", "whole_run", "whole_rounds", "sweep", "memory",
                     "memory_budget", "device", "threads", "seed"):  # fmt: skip
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                words += _option(name, value)
        return shlex.join(words)


class CaseSettings(Section):
    """One subject in one dtype, measured at several batch sizes.

    ``depth`` and ``sample_size`` are those of a preset; None: the subject's own.
    """

    dtype: Dtype
    batches: Annotated[tuple[PositiveInt, ...], Strict(False)]
    depth: int | None = None
    sample_size: int | None = None


def plan_cases(settings: BenchSettings, depth: int | None = None) -> list[CaseSettings]:
    """What to measure, in order.

    Args:
        depth: blocks of the preset; None for a model.
    """
    depths, sizes, batches = [depth], [settings.sample_size], settings.batches
    if not settings.is_preset:
        depths = sizes = [None]
    elif settings.sample_size is None:
        sizes = [DEFAULT_SAMPLE_SIZE]
    if settings.sweep == "batch":
        batches = SWEPT_BATCHES
    elif settings.sweep == "tokens" and sizes[0] is not None:
        sizes = [max(1, sizes[0] // 2), sizes[0], 2 * sizes[0]]
    elif settings.sweep == "depth" and depth is not None:
        depths = list(dict.fromkeys(-(-depth // parts) for parts in (8, 4, 2, 1)))
    return [
        CaseSettings(dtype=dtype, batches=tuple(sorted(batches)), depth=blocks, sample_size=size)
        for dtype in settings.dtypes
        for blocks in depths
        for size in sizes
    ]


_OPTION_NAMES = {"batches": "batch", "dtypes": "dtype", "modes": "mode"}


def _option(name: str, value: Any) -> list[str]:
    option = "--" + _OPTION_NAMES.get(name, name).replace("_", "-")
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, tuple):
        return [option, ",".join(map(str, value))]
    return [option, str(value)]
