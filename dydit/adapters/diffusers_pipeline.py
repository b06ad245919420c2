"""Our networks behind the interface of diffusers' ``DiTTransformer2DModel``, for ``DiTPipeline`` to run."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from dydit.guidance import Denoiser, for_run


class _Run(threading.local):
    """The network for the sampling run that a thread is in, and the network that it was made of."""

    of: nn.Module | None = None
    denoiser: Denoiser | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """For ``copy.deepcopy`` and ``pickle``: a copy is in no run."""
        return type(self), ()


class PipelineTransformer(nn.Module):
    """A class-conditional network as a pipeline's ``transformer``.

    ``pipeline.transformer = PipelineTransformer(engine, pipeline.scheduler)``. The pipeline takes 1000 for
    the null class, so the network must have 1000 classes; an engine's schedule must hold the timesteps of the
    pipeline's scheduler.

    Args:
        network: a DiT, a DyDiT or a SubnetEngine, with square latents.
        scheduler: the pipeline's; with it an engine is told the calls of a run before the first of them (see
            ``SubnetEngine.for_run``).
    """

    def __init__(self, network: nn.Module, scheduler: SchedulerMixin | None = None) -> None:
        super().__init__()
        self.network = network
        self._scheduler: Any = scheduler
        self._run = _Run()
        shape: Any = network.shape
        self.config = SimpleNamespace(
            sample_size=shape.sample_size[0], in_channels=shape.in_channels, out_channels=shape.out_channels
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the network's weights."""
        return next(self.parameters()).device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict as the network does.

        Args:
            hidden_states: latents (B, C, height, width).
            timestep: timesteps (B,).
            class_labels: labels (B,).
            return_dict: False returns a tuple.

        Raises:
            As the network does.
        """
        sample = self._predict(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _predict(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        known: Any = getattr(self._scheduler, "timesteps", None)
        steps = set(timesteps.tolist()) if known is not None and timesteps.shape == x.shape[:1] else ()
        if len(steps) != 1:
            return self.network(x, timesteps, y)
        (t,), calls, run = steps, known.tolist(), self._run
        denoiser = run.denoiser if run.of is self.network and t != calls[0] else None
        if denoiser is None:
            denoiser = for_run(self.network, calls, y)
        # After the last call nothing is held on to: the network may be replaced.
        run.of, run.denoiser = (None, None) if t == calls[-1] else (self.network, denoiser)
        return denoiser(x, t, y)
