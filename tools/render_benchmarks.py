"""Render docs/benchmarks.md and its pictures from docs/benchmarks/*.json.

    dydit bench DiT-XL/2 --batch 2,8 --dtype fp32,bf16 --rounds 9 --out bench
    cp bench/bench.json docs/benchmarks/MACHINE-dit-xl-2.json
    python tools/render_benchmarks.py

``--check`` writes nothing and fails where the page is not what the files render to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dydit.benchmark.collection import read_collection, render_collection
from dydit.benchmark.figures import draw
from dydit.errors import DyditError
from dydit.files import write_file

DOCS = Path(__file__).parents[1] / "docs"


def render(docs: Path, check: bool) -> str:
    """Write the page and the pictures of ``docs``/benchmarks; what was done, in a line.

    Raises:
        DyditError: a file cannot be used; with ``check``, the page is another.
    """
    collection = read_collection(docs / "benchmarks")
    page, text = docs / "benchmarks.md", render_collection(collection)
    if check:
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            raise DyditError(
                f"{page} is not what its files render to", remedy="run tools/render_benchmarks.py"
            )
        return f"{page} is what {len(collection)} files render to"
    for name, found in collection.items():
        write_file(docs / "benchmarks" / f"{name}.png", draw(found))
    write_file(page, text)
    return f"wrote {page} and {len(collection)} pictures"


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
