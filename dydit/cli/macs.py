"""``dydit macs``: multiply-adds of one forward, counted on the network that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def macs(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_PRESET", help="A preset such as DiT-XL/2, or a model or run."),
    ],
    sample_size: Annotated[
        int, typer.Option(min=1, help="Side of the input in latent pixels; presets only.")
    ] = 32,
    schedule: Annotated[Path | None, typer.Option(help="Export folder: count its subnetworks too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the multiply-adds of one forward.

    For one image; 1 MAC = 2 FLOPs. An engine's count is the mean over its timesteps."""
    from dydit.cli.mac_rows import count_rows, rows_as_json, rows_as_text

    rows = count_rows(model, sample_size, schedule)
    typer.echo(rows_as_json(model, rows) if as_json else rows_as_text(rows))
