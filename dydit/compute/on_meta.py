"""Counting a network without its weights and without computing: XL/2 in seconds and no memory.

The MACs of a dense network depend on shapes alone, and tensors on torch's "meta" device are shapes. An engine
cannot be counted so: which tokens it gathers depends on their values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dydit.compute.counting import MacReport, count_macs
from dydit.shapes import ModelShape

_ANY_TIMESTEP = 500.0  # every timestep of a dense network costs the same


def count_on_meta(build: Callable[[], Any]) -> MacReport:
    """MACs of one forward of one image.

    Args:
        build: makes the network, a ``DiT`` or a ``DyDiT``; runs with "meta" as the default device.
    """
    with torch.device("meta"):
        network = build().eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            _keep_off_meta(layer)
    x, y = noise_inputs(network.shape, device="meta")
    return count_macs(network, x, _ANY_TIMESTEP, y)


def like(model: Any) -> Callable[[], Any]:
    """What builds another model of the same class and configuration (a ``DiT``, a ``DyDiT``)."""
    # Not from_config: it leaves out arguments that were given by position, which it takes for defaults.
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    cls: Callable[..., Any] = type(model)
    return partial(cls, **settings)


def noise_inputs(
    shape: ModelShape, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Noise x (1, C, height, width) of seed 0, and label 0 (1,), or noise for text (1, M, context_dim)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, shape.in_channels, *shape.sample_size, generator=generator)
    y = torch.zeros(1, dtype=torch.long)
    if shape.takes_text:
        y = torch.randn(1, shape.context_length, shape.context_dim, generator=generator).to(dtype)
    return x.to(device, dtype), y.to(device)


def _keep_off_meta(layer: nn.Conv2d) -> None:
    """Run the patch embedding on zeros: torch cannot trace a convolution on the meta device.

    Its share of the work is a thousandth.
    """
    layer.to_empty(device="cpu")
    layer.register_forward_pre_hook(lambda _, inputs: torch.zeros(inputs[0].shape))
    layer.register_forward_hook(lambda _module, _inputs, output: output.to("meta"))
