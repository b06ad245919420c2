"""``dydit macs``: multiply-adds of one forward, by closed form and counted on the network that runs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dydit.cli.sizes import parse_sides
from dydit.errors import ConfigError


class Rows(str, Enum):
    """What the rows of the table are."""

    part = "part"
    block = "block"
    timestep = "timestep"


class Format(str, Enum):
    """How the table is printed."""

    text = "text"
    json = "json"
    csv = "csv"


def macs(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_PRESET",
            help="A preset such as DiT-XL/2, or a checkpoint, model, run or export.",
            show_default=False,
        ),
    ] = None,
    all_presets: Annotated[
        bool, typer.Option("--all-presets", help="Every preset, beside the paper's figures.")
    ] = False,
    by: Annotated[
        Rows, typer.Option(help="What the rows are; timestep needs an export or a run.")
    ] = Rows.part,
    schedule: Annotated[
        Path | None, typer.Option(help="Export folder: run its subnetworks on the model.", show_default=False)
    ] = None,
    sample_size: Annotated[
        str | None,
        typer.Option(help="Latent size of a preset, 32 or 32x64 (height x width).", show_default="32"),
    ] = None,
    conditioning: Annotated[
        str | None, typer.Option(help="Conditioning design of a preset.", show_default="adaln_zero")
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.text,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Count the multiply-adds of one forward for one image, two ways.

    By closed form, and by fvcore on the network that runs; fails if they differ. 1 MAC = 2 FLOPs."""
    if (model is None) != all_presets or (all_presets and (schedule or by is not Rows.part)):
        raise ConfigError(
            "--all-presets with a model, --schedule or --by" if all_presets else "no model",
            expected="a preset or a model, or --all-presets alone",
        )
    size = parse_sides(sample_size)
    from dydit.cli import mac_sheets as sheets_of
    from dydit.cli.mac_networks import all_preset_macs, is_preset, model_macs, need_steps, preset_macs

    if model is None:
        presets = all_preset_macs(size, conditioning)
        networks, title = [network for _, network in presets], "all presets"
        sheets = [sheets_of.preset_sheet(presets)]
    else:
        if is_preset(model):
            if schedule is not None:
                raise ConfigError(f"--schedule for preset {model}", expected="the model that was exported")
            shape, network = preset_macs(model, size, conditioning)
            networks = [network]
        elif size is not None or conditioning is not None:
            raise ConfigError(
                f"--sample-size or --conditioning for {model}, which has its own", expected="a preset"
            )
        else:
            shape, networks = model_macs(model, schedule)
        title = f"{model}: {sheets_of.describe(shape)}"
        shown = need_steps(networks) if by is Rows.timestep else networks
        sheets = [sheets_of.network_sheet(network, by.value, networks[0]) for network in shown]
    form = Format.json if as_json else output
    if form is Format.csv:
        typer.echo(sheets_of.as_csv(sheets))
    else:
        typer.echo((sheets_of.as_json if form is Format.json else sheets_of.as_text)(title, sheets))
    for network in networks:
        network.check()
