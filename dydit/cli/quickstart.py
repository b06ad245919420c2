"""``dydit quickstart``: the whole method on the shipped backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dydit.errors import ConfigError


def quickstart(
    steps: Annotated[int | None, typer.Option(min=1, help="Fine-tuning steps.", show_default="300")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Target compute ratio, above 0 and at most 1.", show_default="0.5")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for everything that is made.", show_default="quickstart")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of all random numbers.", show_default="0")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also fine-tune the static backbone as long, and compare.")
    ] = False,
) -> None:
    """Fine-tune, export, sample, count, time and report.

    Takes the shipped digits model; needs no network, no GPU and no arguments."""
    if ratio is not None and not 0 < ratio <= 1:
        raise ConfigError(
            f"--ratio is {ratio:g}",
            expected="a number above 0 and at most 1",
            remedy="0.5 keeps half the compute",
        )
    from dydit.quickstart import run_quickstart

    run_quickstart(steps, ratio, str(out) if out is not None else None, seed, control)
