"""What a benchmark found: measured values only; ratios and shares are computed when they are asked for."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from dydit.benchmark.settings import BenchSettings, Dtype
from dydit.compute.latency import Spread

STATIC, MASKED, ALL_ON = "static", "masked", "all_on"
MODES = ("exact", "capacity")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Machine(_Frozen):
    """Where it was measured.

    Attributes:
        threads: CPU threads of torch; cores: of the machine, as the process may use them.
        load: processes that wanted to run in the minute before (load average); None where nobody counts them.
        instructions: the widest that torch uses on the CPU, such as AVX2; None on a GPU, and in older files.
        commit: of the checkout that dydit ran from, with "-dirty" where its code was changed since; None
            where it is installed, and in older files.
    """

    processor: str
    device: str
    threads: int
    cores: int
    system: str
    python: str
    torch: str
    dydit: str
    load: float | None = None
    instructions: str | None = None
    commit: str | None = None

    @property
    def name(self) -> str:
        """Of the processor, with what sets it apart from others that call themselves the same."""
        return self.processor if self.instructions is None else f"{self.processor} ({self.instructions})"


class Round(_Frozen):
    """One timed call of each network, at one timestep: milliseconds in the order in which they ran."""

    timestep: float
    ms: dict[str, PositiveFloat]


class Memory(_Frozen):
    """Peak bytes of a process with one network, above the same process before it had a model.

    Attributes:
        peaks: static and each mode of the engine -> bytes.
        budget: bytes of packed weights that the engine may keep.
    """

    peaks: dict[str, int]
    budget: int

    def above_static(self, mode: str) -> int:
        """Bytes that an engine takes more than the static backbone."""
        return self.peaks[mode] - self.peaks[STATIC]


class WholeRun(_Frozen):
    """Whole sampling runs of the static backbone and of engines that had nothing packed at their start.

    Attributes:
        sampler, steps, guidance_scale: of the runs.
        ms: static and each mode -> milliseconds of each run.
        macs: static and each mode -> MACs of a run, of the engine for the tokens that it kept in a run.
        packs: mode -> counters of packed weights over one run; ``bytes`` as it stands at the end.
    """

    sampler: str
    steps: int
    guidance_scale: float
    ms: dict[str, Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]]
    macs: dict[str, PositiveInt]
    packs: dict[str, dict[str, int]]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not {STATIC, *self.packs} == set(self.ms) == set(self.macs):
            raise ValueError("whole runs of other networks than their MACs or packs")
        if len({len(ms) for ms in self.ms.values()}) != 1:
            raise ValueError("whole runs, of one network more than of another")
        return self

    def speedup(self, mode: str) -> Spread:
        """Static over engine, run by run."""
        return Spread.of(np.asarray(self.ms[STATIC]) / np.asarray(self.ms[mode]))

    def ideal(self, mode: str) -> float:
        """Static over engine, in MACs."""
        return self.macs[STATIC] / self.macs[mode]

    def share(self, mode: str) -> float:
        """Measured speed-up over the ideal one."""
        return self.speedup(mode).median / self.ideal(mode)


class Case(_Frozen):
    """One subject in one dtype at one batch size.

    Attributes:
        batch: images. rows: samples of a call, twice as many with guidance.
        sample_size: of the latent. tokens: N. depth: L.
        timesteps: of the calls.
        macs: static and each mode -> MACs of a call at each of the timesteps.
        counted: mode -> MACs counted by fvcore on a call at the first timestep, equal to the closed form for
            the tokens that it kept. On the CPU those of ``macs`` can be a few more or fewer, in mode exact:
            the block runs in another form when it is counted, where scores round differently.
        kept: mode -> share of tokens that entered the MLP, mean over the calls.
        capacity_difference: ‖capacity − exact‖ / ‖exact‖ of their outputs, mean over the calls; None where
            only one mode was measured.
        rounds: the measurement.
        subnetworks: distinct subnetworks of each block over the schedule.
        view_share: share of (timestep, block) pairs that need no packing.
    """

    dtype: Dtype
    batch: int
    rows: int
    sample_size: tuple[int, int]
    tokens: int
    depth: int
    timesteps: tuple[float, ...]
    macs: dict[str, tuple[PositiveInt, ...]]
    counted: dict[str, int]
    kept: dict[str, float]
    rounds: Annotated[tuple[Round, ...], Field(min_length=1)]
    subnetworks: tuple[int, ...]
    view_share: float
    capacity_difference: float | None = None
    memory: Memory | None = None
    whole_run: WholeRun | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes of the engine that were measured."""
        return tuple(mode for mode in MODES if mode in self.macs)

    @property
    def repeated(self) -> bool:
        """Whether every timestep has several rounds, without which there is no spread."""
        return min(Counter(entry.timestep for entry in self.rounds).values()) > 1

    def times(self, name: str) -> np.ndarray:
        """Milliseconds (R,) of a network in each round."""
        return np.asarray([entry.ms[name] for entry in self.rounds])

    def median_ms(self, name: str) -> float | None:
        """Median of a network's calls; None where it was not measured."""
        return float(np.median(self.times(name))) if name in self.rounds[0].ms else None

    def time_ratio(self, name: str) -> Spread | None:
        """A network's time over the static one's; None where it was not measured.

        Of the same round: median and quartiles at each timestep, and of these the mean over the timesteps, as
        the static network takes the same time at each.
        """
        if name not in self.rounds[0].ms:
            return None
        at: dict[float, list[float]] = {}
        for entry in self.rounds:
            at.setdefault(entry.timestep, []).append(entry.ms[name] / entry.ms[STATIC])
        return Spread.mean([Spread.of(ratios) for ratios in at.values()])

    def speedup(self, mode: str) -> Spread:
        """Static time over an engine's."""
        ratio = self.time_ratio(mode)
        assert ratio is not None
        return ratio.inverse()

    def ideal(self, mode: str) -> float:
        """Static MACs over an engine's, of all timesteps that were timed."""
        timed = {entry.timestep for entry in self.rounds}
        static, engine = (
            sum(macs for t, macs in zip(self.timesteps, self.macs[name], strict=True) if t in timed)
            for name in (STATIC, mode)
        )
        return static / engine

    def share(self, mode: str) -> Spread:
        """Measured speed-up over the ideal one."""
        return self.speedup(mode).over(self.ideal(mode))

    def derived(self) -> dict[str, Any]:
        """Every figure that is computed from the measured ones, as plain values."""
        return {
            "static_ms": self.median_ms(STATIC),
            **{
                mode: {
                    "ms": self.median_ms(mode),
                    "speedup": vars(self.speedup(mode)),
                    "ideal": self.ideal(mode),
                    "share": vars(self.share(mode)),
                    "whole_run": None if self.whole_run is None else {
                        "speedup": vars(self.whole_run.speedup(mode)),
                        "ideal": self.whole_run.ideal(mode),
                        "share": self.whole_run.share(mode),
                    },
                    "bytes_above_static": None if self.memory is None else self.memory.above_static(mode),
                }
                for mode in self.modes
            },
            **{
                f"{name}_time_ratio": None if (ratio := self.time_ratio(name)) is None else vars(ratio)
                for name in (MASKED, ALL_ON)
            },
        }  # fmt: skip

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        names = [set(entry.ms) for entry in self.rounds]
        if any(other != names[0] for other in names) or not {STATIC, *self.modes} <= names[0]:
            raise ValueError("rounds of other networks than the first, or without some")
        if not {entry.timestep for entry in self.rounds} <= set(self.timesteps):
            raise ValueError("rounds at other timesteps than the case's")
        if {len(self.timesteps)} != {len(macs) for macs in self.macs.values()}:
            raise ValueError("MACs of other timesteps than the case's")
        modes = set(self.modes)
        if set(self.macs) != {STATIC, *modes} or not set(self.counted) == set(self.kept) == modes:
            raise ValueError("MACs, counts or kept tokens of other modes than were timed")
        if self.whole_run is not None and set(self.whole_run.packs) != modes:
            raise ValueError("whole runs of other modes than were timed")
        return self


class Benchmark(_Frozen):
    """One ``dydit bench``.

    Attributes:
        command: what measures it again.
        settings: its ``BenchSettings``.
        started, finished: times in UTC; ``finished`` is None as long as cases are missing.
        cases: in the order in which they were measured.
    """

    command: str
    settings: dict[str, Any]
    machine: Machine
    started: str
    finished: str | None = None
    cases: tuple[Case, ...] = ()

    @model_validator(mode="after")
    def _has_cases(self) -> Self:
        if self.finished is not None and not self.cases:
            raise ValueError("a benchmark that is finished, without cases")
        return self

    @field_validator("settings")
    @classmethod
    def _are_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return BenchSettings(**settings).model_dump(mode="json")

    @property
    def is_whole(self) -> bool:
        """Whether it is of the subject as it is: not of fewer blocks or other latents, nor a sweep."""
        return all(self.settings[name] is None for name in ("sweep", "depth", "sample_size"))
