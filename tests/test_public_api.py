from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dydit


def test_import_costs_nothing() -> None:
    heavy = "torch", "numpy", "diffusers", "pydantic"
    code = f"import sys, dydit; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""


@pytest.mark.parametrize("name", dydit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(dydit, name)
    assert value.__name__ == name if name != "__version__" else value.count(".") == 2


def test_dir_is_the_public_names() -> None:
    assert dir(dydit) == sorted(dydit.__all__)
    assert set(dydit.__all__) == {*dydit._PUBLIC, "__version__"}


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(dydit.__file__).read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name: node.module
        for block in guarded
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == dydit._PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dydit' has no attribute 'nothing'"):
        dydit.nothing  # noqa: B018
    assert not hasattr(dydit, "DiTs")
