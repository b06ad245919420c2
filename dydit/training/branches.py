"""Which losses a step has: the configured terms over the models at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from dydit.config import RunConfig
from dydit.dynamic.compute_loss import compute_ratio
from dydit.errors import ConfigError
from dydit.training.batch import NoisyBatch
from dydit.training.features import block_outputs
from dydit.training.losses import LossTerms, complete_terms, dynamic_terms, static_terms, teacher_terms
from dydit.training.schedules import decisiveness_weight


class Branches:
    """The terms of the loss; what is trained, and when, is the configuration's affair.

    Args:
        accelerator: for number format and averages over processes.
        model: the model in training, wrapped as accelerate gave it back.
        plain: the same without wrappers.
        teacher: the frozen backbone for ``warmup.mode`` distill; ignored otherwise.
        cfg: the run.

    Raises:
        ConfigError: ``warmup.mode`` is distill and there is no teacher.
    """

    def __init__(
        self, accelerator: Accelerator, model: Any, plain: Any, teacher: Any, cfg: RunConfig
    ) -> None:
        self.accelerator, self.model, self.plain, self.cfg = accelerator, model, plain, cfg
        self.teacher: Any = None
        if cfg.task == "finetune" and cfg.warmup.mode == "distill" and cfg.warmup.steps > 0:
            if teacher is None:
                raise ConfigError("warmup.mode is distill without a teacher", remedy="pass frozen_backbone")
            self.teacher = teacher.to(accelerator.device).eval().requires_grad_(False)

    def complete(self, objective: Any, batch: NoisyBatch, step: int) -> LossTerms | None:
        """The complete model's loss on a part of the batch; None where the recipe has none (any more)."""
        if not self._warming_up("complete", step):
            return None
        return complete_terms(self.model, objective, batch, self.cfg.warmup)

    def main(self, objective: Any, batch: NoisyBatch, step: int) -> LossTerms:
        """The loss of the static or dynamic model itself, and everything that shares its forward."""
        if self.cfg.task == "pretrain":
            return static_terms(self.model, objective, batch, self.cfg.train.diffusion_weight)
        teaching = self._warming_up("distill", step)
        routing = self.plain.routing_config
        compares = teaching and self.cfg.warmup.feature_weight > 0
        with block_outputs(self.plain.dynamic_blocks if compares else ()) as features:

            def teach(output: Tensor, batch: NoisyBatch) -> LossTerms:
                return self._teach(output, features, batch)

            return dynamic_terms(
                self.model, objective, batch,
                ratio_of=self.ratio,
                compute=self.cfg.compute,
                diffusion_weight=self.cfg.train.diffusion_weight,
                step=step,
                mean_over_ranks=self.mean_over_ranks,
                decisiveness=decisiveness_weight(self.cfg.gates, step),
                thresholds=(routing.threshold, routing.token_threshold),
                teach=teach if teaching else None,
            )  # fmt: skip

    def ratio(self, routing: Any) -> Tensor:
        """Executed over static MACs (B,)."""
        return compute_ratio(self.plain.shape, self.plain.routing_config, routing)

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """A detached scalar's mean over all processes."""
        return self.accelerator.reduce(value, "mean")

    def _teach(self, output: Tensor, features: Sequence[Tensor], batch: NoisyBatch) -> LossTerms:
        with self.accelerator.autocast():
            return teacher_terms(output, features, self.teacher, batch, self.cfg.warmup)

    def _warming_up(self, mode: str, step: int) -> bool:
        warmup = self.cfg.warmup
        weighs = warmup.weight > 0 or (mode == "distill" and warmup.feature_weight > 0)
        return self.cfg.task == "finetune" and warmup.mode == mode and step < warmup.steps and weighs
