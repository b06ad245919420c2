"""Which adapter speaks for which model class. A new architecture is one file and one row here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from dydit.adapters.base import Adapter
from dydit.errors import ShapeError

# Class name -> (module and class of the model, module and class of its adapter); imported on first use.
ADAPTERS = {
    "DiT": ("dydit.models.dit:DiT", "dydit.adapters.dit:DiTAdapter"),
    "DiTTransformer2DModel": (
        "diffusers:DiTTransformer2DModel",
        "dydit.adapters.diffusers_dit:DiffusersDiTAdapter",
    ),
}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's class, or of its nearest base class that has one.

    Raises:
        ShapeError: there is none; names the supported classes.
    """
    return _resolve(ADAPTERS[backbone_class(model)][1])()


def backbone_class(model: nn.Module) -> str:
    """Name of a model's class, or of its nearest base class, that has an adapter: what saves it loads again.

    Raises:
        ShapeError: there is none; names the supported classes.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in ADAPTERS and cls is backbone_type(cls.__name__):
            return cls.__name__
    name = type(model).__name__
    if name in ADAPTERS:  # and still another class
        name = f"{name} of module {type(model).__module__}, not of {ADAPTERS[name][0].partition(':')[0]}"
    raise ShapeError(
        f"model of class {name}",
        expected="one of " + ", ".join(ADAPTERS),
        remedy="write an adapter (docs/architecture.md)",
    )


def build_backbone(class_name: str, config: dict[str, Any]) -> nn.Module:
    """A backbone with fresh weights from its class name and constructor arguments.

    Raises:
        ShapeError: the class is not supported.
    """
    return backbone_type(class_name)(**config)


def backbone_type(class_name: str) -> type[nn.Module]:
    """The class of a supported backbone by its name.

    Raises:
        ShapeError: it is not supported.
    """
    if class_name not in ADAPTERS:
        raise ShapeError(f"backbone of class {class_name!r}", expected="one of " + ", ".join(ADAPTERS))
    return _resolve(ADAPTERS[class_name][0])


def _resolve(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)
