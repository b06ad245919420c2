"""Render docs/benchmarks.md and its pictures from docs/benchmarks/*.json, where what is derived is made anew.

    dydit bench DiT-XL/2 --batch 2,8 --dtype fp32,bf16 --rounds 9 --out bench
    cp bench/bench.json docs/benchmarks/MACHINE-dit-xl-2.json
    python tools/render_benchmarks.py

``--check`` writes nothing and fails where page or files are not what the measurements render to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dydit.benchmark.collection import read_collection, render_collection
from dydit.benchmark.figures import draw
from dydit.benchmark.storage import as_json
from dydit.errors import DyditError
from dydit.files import write_file

DOCS = Path(__file__).parents[1] / "docs"


def render(docs: Path, check: bool) -> str:
    """Write the page and the files of ``docs``/benchmarks; what was done, in a line.

    Raises:
        DyditError: a file cannot be used, or a picture is of none; with ``check``, something is another.
    """
    folder, page = docs / "benchmarks", docs / "benchmarks.md"
    collection = read_collection(folder)
    texts = {page: render_collection(collection)}
    texts |= {folder / f"{name}.json": as_json(found) for name, found in collection.items()}
    strange = {path.stem for path in folder.glob("*.png")} - set(collection)
    if strange:
        name = min(strange)
        raise DyditError(f"{folder / name}.png without {name}.json", remedy="remove it, or add the other")
    if check:
        others = [path for path, text in texts.items() if not _holds(path, text)]
        others += [path for name in collection if not (path := folder / f"{name}.png").is_file()]
        if others:
            raise DyditError(
                f"{others[0]} is not what its files render to", remedy="run tools/render_benchmarks.py"
            )
        return f"{page} is what {len(collection)} files render to"
    for name, found in collection.items():
        write_file(folder / f"{name}.png", draw(found))
    for path, text in texts.items():
        write_file(path, text)
    return f"wrote {page} and {len(collection)} pictures"


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with benchmarks/*.json")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args()
    try:
        print(render(options.docs, options.check))
    except DyditError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
