"""RunConfig: one training run, from its data to the sampler that its results are looked at with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from dydit.config.sections import (
    MAX_SEED,
    ComputeConfig,
    DataConfig,
    DyDiTConfig,
    GatesConfig,
    ModelConfig,
    ObjectiveConfig,
    PathText,
    SamplerConfig,
    Section,
    TrainConfig,
    WarmupConfig,
    samplers_of,
)
from dydit.errors import ConfigError


class RunConfig(Section):
    """Everything that decides a training run; saved beside its results.

    ``pretrain`` trains the static model of ``model``; ``finetune`` converts ``backbone`` and trains it
    with the sections ``dydit``, ``compute``, ``warmup`` and ``gates``, which ``pretrain`` does not read.
    """

    task: Literal["pretrain", "finetune"] = Field(description="train a static backbone, or make one dynamic")
    output_dir: PathText = Field(description="folder of the run; relative to the working directory")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="seed of all random numbers")
    model: ModelConfig | None = Field(default=None, description="the static model; pretrain only")
    backbone: PathText | None = Field(
        default=None,
        description=(
            "pretrained model, finetune only: a Hub id or a path, "
            "looked up in the working directory, then beside the package"
        ),
    )
    on_class_mismatch: Literal["keep", "drop"] = Field(
        default="keep",
        description=(
            "where the backbone has another number of classes than the data, finetune only: keep its label "
            "table, which must be large enough, or drop it for a fresh one (the null class stays)"
        ),
    )
    dydit: DyDiTConfig = Field(default=DyDiTConfig(), description="what becomes dynamic")
    data: DataConfig = Field(default=DataConfig(), description="training samples")
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), description="training loss")
    train: TrainConfig = Field(description="optimiser and checkpoints")
    compute: ComputeConfig = Field(default=ComputeConfig(), description="compute loss; finetune only")
    warmup: WarmupConfig = Field(default=WarmupConfig(), description="stabilising start; finetune only")
    gates: GatesConfig = Field(default=GatesConfig(), description="sharper gates; finetune only")
    sampler: SamplerConfig = Field(default=SamplerConfig(), description="sampler for the finished model")

    @model_validator(mode="after")
    def _sections_fit_task(self) -> Self:
        wanted, other = ("model", "backbone") if self.task == "pretrain" else ("backbone", "model")
        if getattr(self, wanted) is None:
            meaning = RunConfig.model_fields[wanted].description
            raise ConfigError(f"{wanted} is missing for task {self.task}", remedy=f"set {wanted} ({meaning})")
        if getattr(self, other) is not None:
            raise ConfigError(f"{other} is set for task {self.task}", remedy=f"remove {other} or change task")
        if self.task == "pretrain" and self.train.diffusion_weight == 0:
            raise ConfigError(
                "train.diffusion_weight is 0 for task pretrain",
                expected="more than 0: there is no other loss",
                remedy="set it to 1, or leave it out",
            )
        return self

    @model_validator(mode="after")
    def _sampler_fits_objective(self) -> Self:
        flow = self.objective.name == "flow"
        if self.sampler.is_flow != flow:
            raise ConfigError(
                f"sampler.name is {self.sampler.name} with objective.name {self.objective.name}",
                expected=f"{samplers_of(flow)} for this objective",
                remedy="set sampler.name",
            )
        if self.sampler.num_train_timesteps != self.objective.num_timesteps:
            raise ConfigError(
                f"sampler.num_train_timesteps is {self.sampler.num_train_timesteps}, "
                f"objective.num_timesteps is {self.objective.num_timesteps}",
                expected="the same number",
                remedy="set both",
            )
        return self
