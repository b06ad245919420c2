"""``dydit export``: one static subnetwork per sampling timestep, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dydit.cli.sampler_options import Sampler, Steps, sampler_settings
from dydit.errors import OutputError

_MANIFEST = "manifest.json"


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A DyDiT: its folder or file, or a run's folder.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; an export that is there is replaced.")],
    sampler: Sampler = None,
    steps: Steps = None,
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="Put the weights beside the schedule.")
    ] = False,
) -> None:
    """Write a subnetwork for each sampling timestep."""
    _check_replaceable(out)
    from dydit.cli.models import open_dydit, sampler_defaults
    from dydit.diffusion import make_sampler
    from dydit.export.schedule import SubnetSchedule
    from dydit.files import new_folder

    settings = sampler_settings(sampler_defaults(model), sampler, steps)
    network = open_dydit(model)
    timesteps = make_sampler(settings, network.shape.learn_sigma).timesteps
    schedule = SubnetSchedule.from_model(network, timesteps, sampler=settings.model_dump())
    with new_folder(out) as folder:
        schedule.save(str(folder))
        if with_weights:
            network.save_pretrained(folder)
    widths = schedule.heads.mean(), schedule.groups.mean()
    typer.echo(
        f"{out}: {settings.name}, {len(schedule.timesteps)} timesteps; "
        f"{widths[0]:.1%} of heads and {widths[1]:.1%} of MLP groups are on"
    )


def _check_replaceable(out: Path) -> None:
    """Refuse a folder with something else in it: an export takes the place of the whole folder.

    Raises:
        OutputError: it is not empty and no export.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / _MANIFEST).is_file():
        raise OutputError(
            f"{out} holds other files", expected="a new folder or an export", remedy="choose another --out"
        )
