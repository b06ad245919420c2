"""The floors of docs/architecture.md: a file imports from below, or from its own folder without a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import dydit

PACKAGE = Path(dydit.__file__).parent
# Parts by floor, from the ground up.
STOREYS = (
    "errors files",
    "shapes costs guidance precision processor",
    "config models routing diffusion",
    "adapters",
    "dynamic",
    "export runtime compute deployment",
    "latents training evaluation",
    "report",
    "benchmark",
    "quickstart cli",
)
FLOORS = {part: floor for floor, parts in enumerate(STOREYS) for part in parts.split()}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, also inside of functions; not what only typing needs."""
    found: set[str] = set()
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in MODULES and name not in (module, "dydit")}


GRAPH = {module: imports_of(module) for module in MODULES if module != "dydit"}


def test_there_is_no_circle() -> None:
    # An import of a name from a folder also runs the folder's __init__, which may import its own files.
    inner = {
        module: {other for other in found if not module.startswith(f"{other}.")}
        for module, found in GRAPH.items()
    }
    list(TopologicalSorter(inner).static_order())  # raises CycleError, naming the circle


def test_imports_go_downwards() -> None:
    for module, found in GRAPH.items():
        folder = module.split(".")[1]
        for other in found:
            target = other.split(".")[1]
            assert target == folder or FLOORS[target] <= FLOORS[folder], f"{module} imports {other}"


def test_every_part_has_a_floor() -> None:
    assert {module.split(".")[1] for module in GRAPH} <= set(FLOORS)
