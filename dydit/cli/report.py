"""``dydit report``: the page of a finished run, drawn again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with a summary.json.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Page to write; without it FOLDER/report.html.")
    ] = None,
) -> None:
    """Draw the page of a run again from its figures."""
    from dydit.files import write_file
    from dydit.report.html import page_figures, render_page, render_report
    from dydit.report.storage import load_summary

    if out is None:
        typer.echo(f"wrote {render_report(folder)}")
        return
    summary = load_summary(folder)
    write_file(out, render_page(summary, page_figures(summary)))
    typer.echo(f"wrote {out}")
