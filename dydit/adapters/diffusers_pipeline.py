"""Our networks behind the interface of diffusers' ``DiTTransformer2DModel``, for ``DiTPipeline`` to run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


class PipelineTransformer(nn.Module):
    """A class-conditional network as a pipeline's ``transformer``.

    ``pipeline.transformer = PipelineTransformer(engine)``. The pipeline takes 1000 for the null class, so the
    network must have 1000 classes; an engine's schedule must hold the timesteps of the pipeline's scheduler.

    Args:
        network: a DiT, a DyDiT or a SubnetEngine, with square latents.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
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
        sample = self.network(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
