"""The folder of a benchmark: figures as JSON, and what is drawn and written from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dydit.benchmark.results import Benchmark
from dydit.errors import DataError, OutputError
from dydit.files import check_writable, write_file

FORMAT_VERSION = 1
JSON_NAME, PAGE_NAME, FIGURE_NAME = "bench.json", "bench.md", "bench.png"


def check_folder(folder: str | Path) -> None:
    """Make sure before the work that ``folder`` can be written, and is new, empty or of a benchmark.

    Raises:
        OutputError: it cannot, or holds other files, such as a ``bench.json`` that is none of ours.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _holds_benchmark(folder):
        raise OutputError(
            f"{folder} holds other files",
            expected="a new folder or one of a benchmark",
            remedy="choose another --out",
        )
    check_writable(folder)


def holds_finished_benchmark(folder: str | Path) -> bool:
    """Whether a complete benchmark is there, of this version."""
    try:
        return load_benchmark(Path(folder) / JSON_NAME).finished is not None
    except DataError:
        return False


def save_benchmark(found: Benchmark, folder: str | Path) -> None:
    """Write the three files, each whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    from dydit.benchmark.figures import draw
    from dydit.benchmark.page import page

    folder = Path(folder)
    write_file(folder / JSON_NAME, as_json(found))
    write_file(folder / PAGE_NAME, page(found, FIGURE_NAME))
    write_file(folder / FIGURE_NAME, draw(found))


def as_json(found: Benchmark) -> str:
    """The measured values, and beside each case the figures that follow from them."""
    document: dict[str, Any] = {"format_version": FORMAT_VERSION, **found.model_dump(mode="json")}
    for case, fields in zip(found.cases, document["cases"], strict=True):
        fields["derived"] = case.derived()
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def load_benchmark(path: str | Path) -> Benchmark:
    """Read a ``bench.json``, whatever it is called.

    Raises:
        DataError: it cannot be read, is damaged or of another format version.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})", expected=f"a {JSON_NAME}") from error
    version = document.pop("format_version", None) if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}",
            expected=str(FORMAT_VERSION),
            remedy="measure again with this version of dydit",
        )
    try:
        for case in document.get("cases", ()):
            case.pop("derived", None)
        return Benchmark.model_validate(document)
    except (ValidationError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is damaged: {_told(error)}", remedy="measure again") from error


def _holds_benchmark(folder: Path) -> bool:
    """Also one of another version, or damaged."""
    try:
        return "format_version" in json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _told(error: Exception) -> str:
    """What is wrong with a file's values, in a line."""
    if not isinstance(error, ValidationError):
        return str(error)
    wrong = error.errors()[0]
    return ".".join(map(str, wrong["loc"])) + ": " + wrong["msg"].removeprefix("Value error, ")
