"""``dydit sample``: images of given classes, from a static model, a DyDiT, or an exported engine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dydit.cli.execution import DtypeChoice, check_compiler, check_together
from dydit.cli.sampler_options import (
    LARGEST_SEED,
    GuidanceScale,
    GuidedChannels,
    Sampler,
    Steps,
    sampler_settings,
)
from dydit.cli.sizes import parse_bytes
from dydit.errors import CheckpointError, ConfigError, DataError, ScheduleError

if TYPE_CHECKING:
    from dydit.latents.autoencoder import Autoencoder


class EngineMode(str, Enum):
    """The modes of ``dydit.SubnetEngine``."""

    EXACT = "exact"
    CAPACITY = "capacity"


def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A DiT or DyDiT: its folder or file, or a run's.")
    ],
    labels: Annotated[str, typer.Option(metavar="0,1,...", help="Classes to draw, repeated in turn.")],
    out: Annotated[Path, typer.Option(help="Folder for samples.png and samples.safetensors.")],
    schedule: Annotated[
        Path | None, typer.Option(help="Export folder: run its subnetworks, with its sampler.")
    ] = None,
    mode: Annotated[
        EngineMode | None,
        typer.Option(
            help="Tokens of the subnetworks: those above the threshold, or the export's capacities.",
            show_default="exact",
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Sliced weights to keep, such as 1.5GB; without it one more copy of the blocks.",
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run the subnetworks through torch.compile.")
    ] = False,
    dtype: Annotated[
        DtypeChoice | None,
        typer.Option(help="Precision of the subnetworks; without it the model's.", show_default=False),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="Images in all; without it one per class.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise.")] = 0,
    sampler: Sampler = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    guided_channels: GuidedChannels = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|ID", help="Autoencoder that turns latents into the images of samples.png."
        ),
    ] = None,
) -> None:
    """Draw images of given classes."""
    classes = parse_labels(labels)
    engine_options = {
        "--mode": mode, "--memory-budget": memory_budget, "--compile": compile, "--dtype": dtype
    }  # fmt: skip
    with_engine = schedule is not None
    check_together(
        *((name, given or None, "--schedule", with_engine) for name, given in engine_options.items())
    )
    budget = parse_bytes("--memory-budget", memory_budget)
    import torch

    from dydit.cli.images import draw_images, write_images
    from dydit.cli.models import open_dydit, open_model, sampler_defaults
    from dydit.diffusion import make_sampler
    from dydit.export.schedule import SubnetSchedule
    from dydit.files import check_writable
    from dydit.latents.decode import decode_latents
    from dydit.precision import DTYPES
    from dydit.runtime.engine import SubnetEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if compile:
        check_compiler("--compile", device)
    plan = None if schedule is None else SubnetSchedule.load(str(schedule))
    defaults = sampler_defaults(model) if plan is None else exported_sampler(plan.sampler, schedule)
    settings = sampler_settings(defaults, sampler, steps, guidance_scale, guided_channels)
    network: Any = open_model(model) if plan is None else open_dydit(model)
    if network.shape.takes_text:
        raise ConfigError(
            f"{model} takes text", expected="a model of class labels", remedy="sample in Python: make_sampler"
        )
    check_labels(classes, network.shape.num_classes)
    autoencoder = None if vae is None else open_autoencoder(vae, network.shape.in_channels)
    method = make_sampler(settings, network.shape.learn_sigma)
    network = network.to(device).eval()
    if plan is not None:
        for timestep in method.timesteps:
            plan.index_of(timestep)  # a missing one is told before any work is done
        options: dict[str, Any] = {
            "mode": mode.value if mode else "exact",
            "compile": compile,
            "dtype": DTYPES[dtype.value] if dtype else None,
        }
        network = SubnetEngine(network, plan, memory_budget=budget, **options)
    check_writable(out)
    drawn = [classes[i % len(classes)] for i in range(num or len(classes))]
    images = draw_images(method, network, drawn, seed)
    write_images(
        out,
        images,
        drawn,
        columns=len(classes),
        facts={"model": model, "seed": seed, "sampler": settings.model_dump(), "vae": vae},
        decoded=None if autoencoder is None else decode_latents(autoencoder, images),
    )
    form = "engine" if plan is not None else type(network).__name__
    typer.echo(f"{out}: {len(drawn)} images, {form}, {settings.name} with {settings.steps} steps")


def open_autoencoder(path: str, channels: int) -> Autoencoder:
    """The autoencoder for a model's latents.

    Raises:
        CheckpointError: there is none, it is broken, or its latents have other channels than the model's.
    """
    from dydit.latents.autoencoder import load_autoencoder

    autoencoder = load_autoencoder(path)
    if autoencoder.channels != channels:
        raise CheckpointError(
            f"autoencoder {path} has latents of {autoencoder.channels} channels",
            expected=f"{channels}, as the model draws",
            remedy="correct --vae",
        )
    return autoencoder


def parse_labels(text: str) -> list[int]:
    """``"0,3,7"`` as class numbers.

    Raises:
        DataError: it is no list of whole numbers.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise DataError(
            f"--labels is {text!r}", expected="class numbers with commas between, such as 0,3,7"
        ) from None


def check_labels(labels: list[int], num_classes: int) -> None:
    """Refuse a class that the model does not have.

    Raises:
        DataError: names the first such label and the range.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            raise DataError(
                f"label {label}",
                expected=f"a class of the model, 0 to {num_classes - 1}",
                remedy="correct --labels",
            )


def exported_sampler(settings: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The sampler that an export was made for.

    Raises:
        ScheduleError: the export does not say.
    """
    if not settings:
        raise ScheduleError(
            f"schedule {folder} does not name its sampler", remedy="export it with `dydit export`"
        )
    return settings
