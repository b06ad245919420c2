"""dydit: pretrained Diffusion Transformers made dynamic, sliced and measured.

The public names are imported on first use, so that ``import dydit`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "DiT": "dydit.models.dit",
    "load_backbone": "dydit.models.loading",
    "DyDiTConfig": "dydit.config",
    "convert": "dydit.dynamic.convert",
    "DyDiT": "dydit.dynamic.dydit",
    "load_dydit": "dydit.dynamic.loading",
    "Routing": "dydit.routing.routing",
    "SubnetSchedule": "dydit.export.schedule",
    "SubnetEngine": "dydit.runtime.engine",
    "MacReport": "dydit.compute.counting",
    "count_macs": "dydit.compute.counting",
    "ModelShape": "dydit.shapes",
    "DyditError": "dydit.errors",
}

# Spelt out, and not read off _PUBLIC, so that editors and type checkers see the names.
__all__ = [
    "DiT",
    "DyDiT",
    "DyDiTConfig",
    "DyditError",
    "MacReport",
    "ModelShape",
    "Routing",
    "SubnetEngine",
    "SubnetSchedule",
    "__version__",
    "convert",
    "count_macs",
    "load_backbone",
    "load_dydit",
]

if TYPE_CHECKING:
    from dydit.compute.counting import MacReport, count_macs
    from dydit.config import DyDiTConfig
    from dydit.dynamic.convert import convert
    from dydit.dynamic.dydit import DyDiT
    from dydit.dynamic.loading import load_dydit
    from dydit.errors import DyditError
    from dydit.export.schedule import SubnetSchedule
    from dydit.models.dit import DiT
    from dydit.models.loading import load_backbone
    from dydit.routing.routing import Routing
    from dydit.runtime.engine import SubnetEngine
    from dydit.shapes import ModelShape


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dydit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
