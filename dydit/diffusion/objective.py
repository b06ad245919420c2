"""Training objectives behind one call: :func:`make_objective`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dydit.diffusion.flow import FlowObjective
from dydit.diffusion.iddpm import IDDPMObjective
from dydit.diffusion.loss import DiffusionLoss
from dydit.errors import ConfigError

__all__ = ["DiffusionLoss", "Objective", "ObjectiveSettings", "make_objective"]


class ObjectiveSettings(Protocol):
    """What is read of ``dydit.config.ObjectiveConfig``."""

    @property
    def name(self) -> str: ...

    @property
    def num_timesteps(self) -> int: ...

    @property
    def stratified(self) -> bool: ...


class Objective(Protocol):
    """What training needs of an objective: draw t, make x_t, and judge the model's output.

    ``t`` runs up to ``num_timesteps`` in every objective and goes to the model as it is.
    """

    @property
    def num_timesteps(self) -> int: ...

    def sample_t(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """(B,) int64 or float32"""

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, (B, C, H, W)"""

    def loss(self, model_output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> DiffusionLoss:
        """Per sample."""


_OBJECTIVES: dict[str, type[IDDPMObjective] | type[FlowObjective]] = {
    "iddpm": IDDPMObjective,
    "flow": FlowObjective,
}


def make_objective(settings: ObjectiveSettings, learn_sigma: bool) -> Objective:
    """The training objective that the settings name.

    Args:
        settings: name (``iddpm`` or ``flow``), num_timesteps, stratified.
        learn_sigma: whether the model has variance channels.

    Raises:
        ConfigError: for an unknown name or a number of timesteps that makes no schedule.
    """
    if settings.name not in _OBJECTIVES:
        raise ConfigError(f"objective {settings.name!r}", expected=f"one of {', '.join(_OBJECTIVES)}")
    return _OBJECTIVES[settings.name](
        num_timesteps=settings.num_timesteps, learn_sigma=learn_sigma, stratified=settings.stratified
    )
