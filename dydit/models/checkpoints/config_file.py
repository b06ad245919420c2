"""A folder's ``config.json``, checked against the constructor that it is for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dydit.errors import CheckpointError
from dydit.models.checkpoints.sources import read_json
from dydit.shapes import ModelShape

CONFIG = "config.json"


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The class that a model folder is of, and its constructor arguments.

    Raises:
        CheckpointError: the file is missing or broken, or names no class.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}", expected="a folder that save_pretrained wrote")
    config = read_json(folder / CONFIG)
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / CONFIG} names no class", expected="a _class_name")
    return name, {key: value for key, value in config.items() if not key.startswith("_")}


def defaults_of(cls: type) -> dict[str, Any]:
    """Constructor arguments of a class that have a default."""
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def check_arguments(label: str, cls: type, arguments: Mapping[str, Any], max_depth: int) -> None:
    """Refuse arguments that a class's constructor does not take, by name and by type.

    Args:
        label: the folder, for messages.
        cls: the class; its constructor is annotated.
        arguments: what would be passed to it.
        max_depth: more blocks than this cannot be: the weights have not as many tensors.

    Raises:
        CheckpointError: names the argument.
    """
    hints = get_type_hints(inspect.unwrap(cls.__init__))  # type: ignore[misc]
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]  # type: ignore[misc]
    for name, value in arguments.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise CheckpointError(
                f"{label}: {cls.__name__} has no setting {name!r}",
                remedy=f"did you mean {near[0]!r}?" if near else "",
            )
        if not _fits(hints[name], value):
            raise CheckpointError(f"{label}: {name} is {value!r:.100}", expected=f"{hints[name]}")
    # A broken number must not have the machine build blocks for minutes.
    for name in ("depth", "num_layers"):
        if arguments.get(name, 0) > max_depth:
            raise CheckpointError(f"{label}: {name} is {arguments[name]}, with {max_depth} tensors in all")


def check_asked(label: str, shape: ModelShape, **asked: Any) -> None:
    """A folder states its numbers: one that was asked for is either the same or a mistake.

    Args:
        label: the folder, for messages.
        shape: of the model that was loaded.
        asked: fields of the shape as they were asked for; None = as they are.

    Raises:
        CheckpointError: names the first that differs.
    """
    for name, value in asked.items():
        found = getattr(shape, name)
        wanted = (value, value) if name == "sample_size" and isinstance(value, int) else value
        wanted = tuple(wanted) if isinstance(wanted, list) else wanted
        if wanted is not None and wanted != found:
            raise CheckpointError(
                f"{name} {wanted} asked of {label}", expected=f"{found}, as its config.json has"
            )


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
