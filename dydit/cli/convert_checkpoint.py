"""``dydit convert-checkpoint``: weights from one layout to another."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dydit.cli.sizes import parse_sides
from dydit.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from dydit.dynamic.dydit import DyDiT
    from dydit.models.dit import DiT


class Layout(str, Enum):
    """What to write."""

    public = "public"
    diffusers = "diffusers"
    dydit = "dydit"


def convert_checkpoint(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A .pt file, a model's folder, or a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must be new or empty.")],
    to: Annotated[
        Layout | None,
        typer.Option(
            help="public: a DiT by the public names; diffusers: a DiTTransformer2DModel; dydit: a DyDiT. "
            "Without it: public for a static model, dydit for a dynamic one."
        ),
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, for a .pt file of no published size.")
    ] = None,
    sample_size: Annotated[
        str | None, typer.Option(help="Latent size, 32 or 32x64, for a .pt file that does not tell.")
    ] = None,
    no_null_class: Annotated[
        bool,
        typer.Option("--no-null-class", help="The label table of a .pt file has no row for the null class."),
    ] = False,
    allow_inexact: Annotated[
        bool,
        typer.Option("--allow-inexact", help="Write for diffusers although its timestep frequencies differ."),
    ] = False,
) -> None:
    """Write a checkpoint as a folder of safetensors in another layout."""
    size = parse_sides(sample_size)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists", expected="a new or empty folder", remedy="choose another DST")
    from dydit.dynamic.loading import load_dydit
    from dydit.models.loading import load_backbone, stored_class

    found = stored_class(source)
    load = load_dydit if found == "DyDiT" else load_backbone
    null_class = False if no_null_class else None
    model = load(source, num_heads=num_heads, sample_size=size, null_class=null_class)
    layout = to or (Layout.dydit if found == "DyDiT" else Layout.public)
    note = _write(model, out, layout, allow_inexact)
    shape, parameters = model.shape, sum(p.numel() for p in model.parameters())
    typer.echo(
        f"{out}: {layout.value} layout, from {source} ({found}): "
        f"{shape.depth} blocks, width {shape.hidden_size}, {shape.num_heads} heads, "
        f"patch {shape.patch_size}, {parameters / 1e6:.1f} M parameters"
    )
    if note:
        typer.echo(note)


def _write(model: DiT | DyDiT, out: Path, layout: Layout, allow_inexact: bool) -> str:
    """Write the model and return what there is to say about the result.

    Raises:
        CheckpointError: the layout cannot hold the model.
        OutputError: the folder cannot be written.
    """
    from dydit.files import new_folder
    from dydit.models.checkpoints.writing import write_diffusers, write_public
    from dydit.models.dit import DiT

    if layout is Layout.dydit:
        if isinstance(model, DiT):
            raise CheckpointError(
                "a static DiT has no routers to write",
                remedy="make one with `dydit finetune` or dydit.convert",
            )
        with new_folder(out) as folder:
            model.save_pretrained(folder)
        return ""
    if not isinstance(model, DiT):
        raise CheckpointError(f"a DyDiT has routers, which the {layout.value} layout cannot hold",
                              remedy="use --to dydit")  # fmt: skip
    if layout is Layout.diffusers:
        return write_diffusers(model, out, allow_inexact)
    write_public(model, out)
    return ""
