"""The sections of a run's configuration: frozen, with every value's range, unit and meaning beside it.

Defaults are those of Zhao et al. (DyDiT, ICLR 2025) where they hold for any model; what they chose for XL at
half the compute, such as the warm-up's steps and the clip norm, is in configs/dydit_xl_0.5.yaml.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from typing_extensions import Self

from dydit.config.problems import config_error
from dydit.errors import ConfigError

# The designs that take class labels; adaln_single takes text.
Conditioning = Literal["in_context", "cross_attention", "adaln", "adaln_zero"]
SamplerName = Literal["ddim", "ddpm", "dpm++", "flow_euler", "flow_heun"]

# Limits of what torch and NumPy both take as a seed.
MAX_SEED = 2**32 - 1


def _text_of_path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(_text_of_path), Field(min_length=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Pair = Annotated[tuple[PositiveInt, PositiveInt], Strict(False)]  # YAML has lists, not tuples
MomentDecay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversion of types.

    Raises:
        ConfigError: from the constructor, for an unknown key, a wrong type or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as problem:
            raise config_error(problem, type(self)) from None

    # pydantic's own mark for "this constructor only validates": sections inside sections are then
    # validated as one, and an error keeps its full dotted key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class DyDiTConfig(Section):
    """What becomes dynamic in a converted model, and how its routers decide (Zhao et al., DyDiT)."""

    mlp_groups: PositiveInt | None = Field(
        default=None,
        description="channel groups of each MLP, a divisor of its hidden channels; empty: as many as heads",
    )
    head_routing: bool = Field(default=True, description="route attention heads by timestep (TDW)")
    mlp_routing: bool = Field(default=True, description="route MLP channel groups by timestep (TDW)")
    token_routing: bool = Field(default=True, description="let each token skip the MLP (SDT)")
    always_on: bool = Field(
        default=True, description="keep the first head and the first group of every block on"
    )
    temperature: float = Field(default=5.0, gt=0, description="temperature of the Gumbel-sigmoid in training")
    open_bias: float = Field(
        default=15.0, ge=0, description="first bias of the timestep routers, in logits; large: all on"
    )
    token_open_bias: float = Field(
        default=35.0, ge=0, description="first bias of the token routers, in logits"
    )
    threshold: float = Field(default=0.5, gt=0, lt=1, description="a head or group is on above this score")
    token_threshold: float = Field(
        default=0.5, gt=0, lt=1, description="a token enters the MLP above this score"
    )
    token_router_ratio: PositiveInt = Field(
        default=16, description="hidden size divided by the token router's hidden channels"
    )
    rank: Literal["magnitude", "none"] = Field(
        default="magnitude", description="order heads and channels by weight magnitude before conversion"
    )
    nested: bool = Field(
        default=False,
        description=(
            "decide how many of the ranked heads and groups run, not which: the first ones (with rank none, "
            "in the backbone's own order)"
        ),
    )


class ModelConfig(Section):
    """A static backbone to train from scratch: a preset's name, or its dimensions."""

    preset: str | None = Field(
        default=None, description="name of a published size, such as DiT-S/2; empty: give dimensions"
    )
    sample_size: PositiveInt | Pair = Field(
        default=32, description="side of the model's input in latent pixels, or [height, width]"
    )
    patch_size: PositiveInt | None = Field(default=None, description="side of a patch in latent pixels")
    in_channels: PositiveInt = Field(default=4, description="channels of the model's input")
    hidden_size: PositiveInt | None = Field(default=None, description="width of a token")
    depth: PositiveInt | None = Field(default=None, description="number of blocks")
    num_heads: PositiveInt | None = Field(default=None, description="attention heads per block")
    mlp_ratio: float = Field(default=4.0, gt=0, description="MLP hidden channels divided by hidden_size")
    num_classes: PositiveInt = Field(default=1000, description="class labels, without the null class")
    learn_sigma: bool = Field(
        default=True, description="predict the variance as well; doubles the output channels"
    )
    conditioning: Conditioning = Field(
        default="adaln_zero", description="how timestep and label enter the blocks"
    )

    @model_validator(mode="after")
    def _preset_or_dimensions(self) -> Self:
        dimensions = {
            name: getattr(self, name) for name in ("patch_size", "hidden_size", "depth", "num_heads")
        }
        given = [name for name, value in dimensions.items() if value is not None]
        missing = [name for name, value in dimensions.items() if value is None]
        if self.preset is not None and given:
            raise ConfigError(
                f"preset {self.preset} together with {', '.join(given)}", remedy="give one or the other"
            )
        if self.preset is None and missing:
            raise ConfigError(f"{', '.join(missing)} missing", remedy="set them, or preset")
        return self

    def dit_arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``DiT(...)``, or for ``DiT.from_preset(preset, ...)`` where there is one."""
        return self.model_dump(exclude={"preset"}, exclude_none=True)


class DataConfig(Section):
    """Where training samples come from."""

    name: Literal["digits", "shapes", "image_folder", "latents", "hf_datasets", "webdataset"] = Field(
        default="digits",
        description=(
            "digits (built in), shapes (drawn as needed), image_folder (one folder per class), latents "
            "(cached by `encode`), hf_datasets (a folder of that library) or webdataset (tar shards)"
        ),
    )
    path: PathText | None = Field(
        default=None,
        description="folder of the data: looked up in the working directory, then beside the package",
    )
    image_size: PositiveInt | None = Field(
        default=None,
        description="side of the images in pixels; empty: the data's own where it has one, else the model's",
    )
    batch_size: PositiveInt = Field(default=32, description="samples per process and step of the data loader")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="shapes only: other seeds, other images")
    num_workers: int = Field(default=0, ge=0, description="loader processes; 0: load in the main process")
    class_dropout: float = Field(
        default=0.1, ge=0, le=1, description="share of labels replaced by the null class"
    )
    flip: bool = Field(default=False, description="mirror half of the images left to right")
    on_bad: Literal["raise", "skip"] = Field(
        default="raise",
        description="what to do about an unreadable file, or a label that the model has no class for",
    )

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        if self.name not in ("digits", "shapes") and self.path is None:
            raise ConfigError(
                f"name is {self.name} and path is empty", remedy="set path to the folder of the data"
            )
        return self


class ObjectiveConfig(Section):
    """The training loss: IDDPM (Nichol & Dhariwal) or flow matching on a linear path (Ma et al., SiT)."""

    name: Literal["iddpm", "flow"] = Field(
        default="iddpm", description="noise prediction with learned variance, or velocity"
    )
    num_timesteps: PositiveInt = Field(default=1000, description="diffusion timesteps T")
    stratified: bool = Field(default=True, description="draw timesteps from four equal ranges in every batch")


class TrainConfig(Section):
    """The optimiser (AdamW), its schedule, and what is written when."""

    steps: PositiveInt = Field(description="optimiser steps in all")
    lr: float = Field(default=1e-4, gt=0, description="learning rate")
    router_lr: float | None = Field(default=None, gt=0, description="learning rate of the routers; empty: lr")
    betas: Annotated[tuple[MomentDecay, MomentDecay], Strict(False)] = Field(
        default=(0.9, 0.999), description="AdamW's two moment decays"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    clip_norm: float | None = Field(
        default=None, gt=0, description="largest gradient norm; empty: no clipping"
    )
    grad_accumulation: PositiveInt = Field(default=1, description="batches per optimiser step")
    diffusion_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of the model's own diffusion loss; 0 leaves it out, finetune only",
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="learning rate after its warm-up"
    )
    lr_warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the learning rate rises from 0"
    )
    ema_decay: float = Field(
        default=0.9999, ge=0, lt=1, description="decay of the averaged weights per step; 0: no averaging"
    )
    ema_device: Literal["model", "cpu"] = Field(
        default="model", description="where the averaged weights lie; cpu saves memory on the GPU"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="number format of forward and backward"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward to save memory"
    )
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    model_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="number format of the exported averaged weights; bfloat16 halves their size",
    )
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Strict(False)] = Field(
        default=(), description="where metrics go besides metrics.jsonl: tensorboard, wandb, if installed"
    )
    log_every: PositiveInt = Field(default=100, description="steps between two lines of metrics")
    save_every: PositiveInt = Field(default=5000, description="steps between two checkpoints")
    keep_last: PositiveInt = Field(default=2, description="newest checkpoints to keep")
    keep_every: PositiveInt | None = Field(
        default=None, description="also keep checkpoints at multiples of this step; empty: none"
    )
    max_nonfinite: PositiveInt = Field(
        default=10, description="steps with a non-finite loss or gradient in a row before giving up"
    )


class ComputeConfig(Section):
    """The compute loss: weight × (executed MACs / static MACs − target)² (Zhao et al., DyDiT)."""

    target: float = Field(
        default=0.5, gt=0, le=1, description="target compute ratio λ, above 0 and at most 1"
    )
    weight: float = Field(
        default=2.0, ge=0, description="weight of the compute loss beside the diffusion loss"
    )
    ramp_steps: int = Field(default=1000, ge=0, description="steps over which the target falls from 1 to λ")


class WarmupConfig(Section):
    """Keeping fine-tuning stable at its start: the complete model, or its teacher, under the same loss."""

    mode: Literal["none", "complete", "distill"] = Field(
        default="complete",
        description="train the complete model alongside, or match the frozen backbone's output",
    )
    steps: int = Field(default=0, ge=0, description="steps with the extra term; 0: none")
    weight: float = Field(default=1.0, ge=0, description="weight of the extra term")
    fraction: float = Field(
        default=1.0, gt=0, le=1, description="share of each batch that the extra term sees"
    )
    feature_weight: float = Field(
        default=0.0,
        ge=0,
        description="distill only: weight of the relative distance to the backbone's tokens after each block",
    )


class GatesConfig(Section):
    """Closing the gap between noisy gates in training and thresholded gates afterwards.

    A gate that is open with probability 0.75 in training always is in evaluation. Both terms make such gates
    rare; both are ours, not part of the published recipe, and off by default.
    """

    final_temperature: float | None = Field(
        default=None,
        gt=0,
        description="temperature that training ends at; empty: dydit.temperature throughout",
    )
    anneal_start: int = Field(default=0, ge=0, description="step at which the temperature begins to change")
    anneal_steps: int = Field(
        default=0, ge=0, description="steps over which it goes, geometrically, to final_temperature"
    )
    decisiveness: float = Field(
        default=0.0,
        ge=0,
        description="weight of the mean of 4·p·(1 − p) over all gates, p the chance of being open; 0: off",
    )
    decisiveness_start: int = Field(default=0, ge=0, description="first step of the decisiveness term")
    decisiveness_ramp: int = Field(default=0, ge=0, description="steps over which its weight rises from 0")


class SamplerConfig(Section):
    """How samples are drawn, and with how much guidance (Ho & Salimans)."""

    name: SamplerName = Field(
        default="ddim", description="ddim, ddpm, dpm++ for iddpm models; flow_euler, flow_heun for flow"
    )
    steps: PositiveInt = Field(default=50, description="sampling steps")
    guidance_scale: float = Field(
        default=1.0, ge=0, description="classifier-free guidance; 1: none, and one forward per step"
    )
    guided_channels: PositiveInt | None = Field(
        default=3, description="channels that are guided, from the first on; empty: all of them"
    )
    num_train_timesteps: PositiveInt = Field(
        default=1000, description="diffusion timesteps T the model was trained with"
    )

    @model_validator(mode="after")
    def _steps_within_timesteps(self) -> Self:
        if self.steps > self.num_train_timesteps:
            raise ConfigError(
                f"steps is {self.steps} with {self.num_train_timesteps} training timesteps",
                expected="no more steps than timesteps",
                remedy=f"set steps to {self.num_train_timesteps} or less",
            )
        return self

    @property
    def is_flow(self) -> bool:
        """Whether this sampler integrates a velocity (flow matching) and not a noise prediction."""
        return _is_flow(self.name)

    def check_kind(self, known: str | None) -> Self:
        """This sampler, for a model that is known to be sampled by ``known``; None: nothing is known.

        Raises:
            ConfigError: one takes the output for a velocity, the other for noise.
        """
        if known is not None and _is_flow(known) != self.is_flow:
            raise ConfigError(
                f"sampler {self.name} for a model that is sampled by {known}",
                expected=samplers_of(flow=not self.is_flow),
                remedy="choose one of these, as the other kind takes the model's output for something else",
            )
        return self


def samplers_of(flow: bool) -> str:
    """Those that integrate a velocity, or those that take the model's output for noise, in words."""
    return "flow_euler or flow_heun" if flow else "ddim, ddpm or dpm++"


def _is_flow(sampler: str) -> bool:
    return sampler.startswith("flow_")
