"""Command-line options that choose a sampler, and the settings they amount to."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dydit.errors import ConfigError

if TYPE_CHECKING:
    from dydit.config import SamplerConfig


class SamplerChoice(str, Enum):
    """The names of ``dydit.config.SamplerConfig``, here without importing pydantic for ``--help``."""

    DDIM = "ddim"
    DDPM = "ddpm"
    DPM = "dpm++"
    FLOW_EULER = "flow_euler"
    FLOW_HEUN = "flow_heun"


Sampler = Annotated[
    SamplerChoice | None, typer.Option(help="Sampling method.", show_default="the model's, else ddim")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Sampling steps.", show_default="the model's, else 50")
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Classifier-free guidance; 1 is none, at half the compute.",
        show_default="the model's, else 1",
    ),
]
GuidedChannels = Annotated[
    str | None,
    typer.Option(
        metavar="N|all", help="Guide the first N channels, or all.", show_default="the model's, else 3"
    ),
]
LARGEST_SEED = 2**64 - 1  # of torch's generators
Texts = Annotated[
    Path | None,
    typer.Option(help="safetensors file of encoded texts, for a model that takes text.", show_default=False),
]


def sampler_settings(
    defaults: Mapping[str, Any],
    sampler: SamplerChoice | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guided_channels: str | None = None,
) -> SamplerConfig:
    """The sampler's settings: ``defaults`` (fields of ``SamplerConfig``) under what was given.

    Raises:
        ConfigError: for a value that the sampler cannot take, or a sampler of the other kind (flow or not).
    """
    from dydit.config import SamplerConfig

    given: dict[str, Any] = {
        "name": None if sampler is None else sampler.value,
        "steps": steps,
        "guidance_scale": guidance_scale,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if guided_channels is not None:
        chosen["guided_channels"] = _channels(guided_channels)
    return SamplerConfig(**{**defaults, **chosen}).check_kind(defaults.get("name"))


def _channels(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--guided-channels is {text!r}", expected="a number of channels, or all") from None
