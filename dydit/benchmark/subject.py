"""What is benchmarked: a model, its schedule and its sampler, made or loaded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dydit.benchmark.settings import DEFAULT_SAMPLE_SIZE, DEFAULT_STEPS, BenchSettings, CaseSettings
from dydit.benchmark.synthetic import even_share, random_dydit, route_tokens, route_widths, token_share
from dydit.compute.complete import Complete
from dydit.compute.engine import kept_tokens, record_token_logits
from dydit.config import SamplerConfig
from dydit.diffusion import Denoiser, Sampler, make_sampler
from dydit.diffusion.betas import linear_betas, signal_levels
from dydit.dynamic.dydit import DyDiT
from dydit.dynamic.loading import load_dydit
from dydit.errors import ConfigError, ScheduleError
from dydit.export.recording import Start
from dydit.export.schedule import SubnetSchedule
from dydit.export.texts import read_texts
from dydit.guidance import batch_labels, for_run
from dydit.models.dit import DiT
from dydit.models.presets import preset_arguments
from dydit.precision import DTYPES
from dydit.runtime.engine import SubnetEngine

GUIDANCE_SCALE = 1.5  # of the DiT paper's best figures; where guidance is asked for and no scale is known
OWN_PART = 0.05  # of a random network's output in a sampling run; the rest is the linear prediction
CAPACITY_SAMPLES = 8  # images whose kept tokens choose the capacities of a model without any


@dataclass(frozen=True)
class Subject:
    """A DyDiT in one dtype on one device.

    Attributes:
        model: in evaluation; static backbone, masked model and engines share its weights.
        schedule: its subnetworks.
        settings: of the sampler; the guidance scale says whether a call holds both halves.
        synthetic: whether the weights are random.
        seed: of the inputs.
        texts: (m, M, context_dim), for a model that takes text.
    """

    model: DyDiT
    schedule: SubnetSchedule
    settings: SamplerConfig
    synthetic: bool
    seed: int
    texts: Tensor | None = None

    @property
    def static(self) -> nn.Module:
        """The backbone: a DiT itself, another class through the model with everything on."""
        backbone = self.model.backbone
        return backbone if isinstance(backbone, DiT) else Complete(self.model)

    @property
    def sampler(self) -> Sampler:
        """The sampling method."""
        return make_sampler(self.settings, self.model.shape.learn_sigma)

    @property
    def guided(self) -> bool:
        """Whether a call holds both halves of classifier-free guidance."""
        return self.settings.guidance_scale != 1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def all_on(self) -> SubnetSchedule:
        """The schedule with every head, group and token on."""
        plan = self.schedule
        return replace(
            plan,
            head_rows=np.ones((1, plan.shape.num_heads), bool),
            group_rows=np.ones((1, plan.shape.mlp_groups), bool),
            rows=np.zeros_like(plan.rows),
            # No score is as low as that: the token routers run, and keep everything.
            routing=plan.routing.model_copy(update={"token_threshold": 1e-300}),
            capacities=None,
        )

    def noise(self, images: int) -> tuple[Tensor, Tensor]:
        """Noise (images, C, height, width) and labels or texts, the start of a sampling run."""
        start = Start.draw(self.model, images, self.seed, self.texts)
        return start.noise, start.labels

    def trajectory(self, network: Denoiser, images: int) -> Iterator[tuple[float, Tensor]]:
        """The steps of a whole sampling run of ``network`` from ``noise``, as ``Sampler.trajectory``."""
        x, labels = self.noise(images)
        if self.synthetic:
            network = _keeping_scale(network, self.settings, x.shape[1])
        added = torch.Generator(x.device).manual_seed(self.seed)  # the same noise in every run
        return self.sampler.trajectory(network, x, labels, self.model.null_label, added)

    def sample(self, network: Denoiser, images: int) -> Tensor:
        """The end of a whole sampling run."""
        ((_, x),) = deque(self.trajectory(network, images), maxlen=1)
        return x

    def calls(self, engine: SubnetEngine, images: int) -> dict[float, tuple[Tensor, Tensor]]:
        """Timestep -> latents and labels of the call that a sampling run of ``images`` makes there.

        Which tokens a trained model keeps depends on what the latents show, so they come from a run of its
        engine; a network with random weights sees noise at every timestep of its runs.
        """
        if not self.synthetic:
            return _record(self, engine, images)
        return dict.fromkeys(self.schedule.timesteps, self.noise_call(images))

    def noise_call(self, images: int) -> tuple[Tensor, Tensor]:
        """Latents and labels or texts of a call on noise, both halves where the sampler guides."""
        x, labels = self.noise(images)
        given = batch_labels(labels, self.model.null_label, self.sampler.guidance_scale)
        return (torch.cat([x, x]) if self.guided else x), given


def make_subject(settings: BenchSettings, case: CaseSettings) -> Subject:
    """The subject of a case, on its device, in its dtype.

    Raises:
        ConfigError, ShapeError: there is no such preset, size or ratio, or a whole run of other steps.
        CheckpointError, ScheduleError: the model or its schedule cannot be used.
    """
    return _synthetic(settings, case) if settings.is_preset else _loaded(settings, case)


def bare_model(settings: BenchSettings, case: CaseSettings, plan: SubnetSchedule | None = None) -> DyDiT:
    """The model of a case, of a preset with routers that were not set yet.

    Raises:
        ScheduleError: ``plan`` was not exported from a loaded model's weights.
    """
    dtype, device = DTYPES[case.dtype], settings.device
    if settings.path is not None:
        # In another dtype than the stored one from the start: a peak of memory would show the conversion.
        model = load_dydit(settings.path, dtype=dtype if plan is None else None).requires_grad_(False)
        if plan is not None:
            SubnetEngine(model, plan)  # refuses a schedule of other weights, while these are as stored
        return nn.Module.to(model, device=device, dtype=dtype)
    size = case.sample_size or DEFAULT_SAMPLE_SIZE
    return random_dydit(settings.subject, size, case.depth, settings.seed, dtype, device)


def given_texts(settings: BenchSettings) -> Tensor | None:
    """Texts of the settings' file.

    Raises:
        DataError: it cannot be read.
    """
    return None if settings.texts is None else read_texts(Path(settings.texts))


def preset_depth(settings: BenchSettings) -> int | None:
    """Blocks of the preset; None for a model.

    Raises:
        ConfigError: there is no such preset.
    """
    return (settings.depth or preset_arguments(settings.subject)["depth"]) if settings.is_preset else None


def _synthetic(settings: BenchSettings, case: CaseSettings) -> Subject:
    model = bare_model(settings, case)
    sampling = _sampler_settings(settings)
    timesteps = make_sampler(sampling, model.shape.learn_sigma).timesteps
    share = even_share(model.shape, model.routing_config, settings.ratio)
    route_widths(model, timesteps, share, settings.seed)
    widths = SubnetSchedule.from_model(model, timesteps)
    capacities = route_tokens(model, widths, token_share(widths, settings.ratio), settings.seed)
    plan = SubnetSchedule.from_model(model, timesteps, sampling.model_dump(), capacities)
    return Subject(model, plan, sampling, synthetic=True, seed=settings.seed)


def _loaded(settings: BenchSettings, case: CaseSettings) -> Subject:
    given = None if settings.schedule is None else SubnetSchedule.load(settings.schedule)
    model = bare_model(settings, case, given)
    texts = given_texts(settings)
    sampling = _sampler_settings(settings, given)
    timesteps = make_sampler(sampling, model.shape.learn_sigma).timesteps
    if sampling.guidance_scale != 1 and model.null_label is None:
        raise ConfigError(
            f"guidance for {settings.subject}, which has no null class",
            expected="a scale of 1",
            remedy="add --no-guidance",
        )
    plan = given or SubnetSchedule.from_model(model, timesteps, sampling.model_dump())
    for timestep in timesteps:
        plan.index_of(timestep)  # a missing one is told before any work is done
    subject = Subject(model, plan, sampling, synthetic=False, seed=settings.seed, texts=texts)
    subject.noise(1)  # missing texts, too
    if "capacity" in settings.modes and plan.capacities is None:
        return replace(subject, schedule=replace(plan, capacities=_mean_kept(subject)))
    return subject


def _sampler_settings(settings: BenchSettings, plan: SubnetSchedule | None = None) -> SamplerConfig:
    """The sampler of the schedule, or else of the model's run, under what was asked for."""
    fields: dict[str, Any] = {"steps": settings.whole_run or DEFAULT_STEPS}
    if plan is not None:
        fields |= plan.sampler or {"steps": len(plan.timesteps)}
        if settings.whole_run not in (None, fields["steps"]):
            raise ScheduleError(
                f"--whole-run {settings.whole_run} with a schedule of {fields['steps']} steps",
                expected="as many",
                remedy="leave --schedule out, or export again for that many steps",
            )
    else:
        own = {name: value for name, value in settings.sampler_defaults.items() if name != "steps"}
        fields |= own if settings.whole_run else settings.sampler_defaults
    known = fields.get("name")
    if settings.sampler is not None:
        fields["name"] = settings.sampler
    if settings.guidance is not None:
        scale = fields.get("guidance_scale", 1.0)
        fields["guidance_scale"] = 1.0 if not settings.guidance else GUIDANCE_SCALE if scale == 1 else scale
    return SamplerConfig(**fields).check_kind(known)


class _Followed:
    """A denoiser, and what is done with each of its outputs; told of a run, it tells the denoiser.

    Args:
        then: takes latents, timestep and output of a call, and gives what is returned.
    """

    def __init__(self, denoiser: Denoiser, then: Callable[[Tensor, float, Tensor], Tensor]) -> None:
        self._denoiser, self._then = denoiser, then

    def __call__(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        return self._then(x, t, self._denoiser(x, t, y))

    def for_run(self, timesteps: Sequence[float], y: Tensor) -> Denoiser:
        """As ``SubnetEngine.for_run``."""
        return _Followed(for_run(self._denoiser, timesteps, y), self._then)


def _keeping_scale(network: Denoiser, settings: SamplerConfig, channels: int) -> Denoiser:
    """A network of random weights beside the best linear prediction for data ~ N(0, 1).

    With it a sampling run keeps its latents at unit variance, as with a trained model; without it they would
    grow a hundredfold, and the token routers would see what they never see in practice.
    """
    signal = signal_levels(linear_betas(settings.num_train_timesteps))

    def linear(t: float) -> float:
        if settings.is_flow:  # E[ε − x₀ | x_t] for x_t = (1 − u)·x₀ + u·ε
            u = t / settings.num_train_timesteps
            return (2 * u - 1) / ((1 - u) ** 2 + u**2)
        return float((1 - signal[round(t)]) ** 0.5)  # E[ε | x_t]

    def add_linear(x: Tensor, t: float, output: Tensor) -> Tensor:
        output.mul_(OWN_PART)
        output[:, :channels] += linear(float(t)) * x
        return output

    return _Followed(network, add_linear)


@contextmanager
def recording_kept(engine: SubnetEngine) -> Iterator[tuple[Denoiser, Callable[[], list[np.ndarray]]]]:
    """A denoiser that calls the engine, and what gives the tokens (B, L) that each of its calls kept."""
    seen: list[tuple[float, int, dict[int, Tensor]]] = []
    with record_token_logits(engine) as logits:

        def note(x: Tensor, t: float, output: Tensor) -> Tensor:
            seen.append((float(t), len(x), dict(logits)))
            return output

        call = _Followed(engine, note)
        yield call, lambda: [kept_tokens(engine, t, rows, scores) for t, rows, scores in seen]


def _record(subject: Subject, engine: SubnetEngine, images: int) -> dict[float, tuple[Tensor, Tensor]]:
    found: dict[float, tuple[Tensor, Tensor]] = {}

    def call(x: Tensor, t: float, y: Tensor) -> Tensor:
        found.setdefault(float(t), (x, y))
        return engine(x, t, y)

    subject.sample(call, images)
    return found


def _mean_kept(subject: Subject) -> np.ndarray:
    """Tokens that the threshold keeps per sample at each timestep of a sampling run, int32 (S, L)."""
    plan = subject.schedule
    engine = SubnetEngine(subject.model, plan, verify=False)
    found: dict[float, np.ndarray] = {}
    with recording_kept(engine) as (call, kept):
        subject.sample(call, CAPACITY_SAMPLES)
        counts = kept()
    for t, kept_now in zip(subject.sampler.call_timesteps, counts, strict=True):
        found[t] = kept_now.mean(0)
    full = np.full(plan.shape.depth, plan.shape.tokens)
    return np.stack([found.get(t, full) for t in plan.timesteps]).round().astype(np.int32)
