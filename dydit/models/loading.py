"""``load_backbone``: pretrained static models from where users have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from dydit.errors import CheckpointError
from dydit.models.checkpoints.class_table import with_classes
from dydit.models.checkpoints.config_file import check_arguments, check_asked, defaults_of, read_config
from dydit.models.checkpoints.diffusers_layout import COMPUTED, LEGACY_SETTINGS, TABLE, dit_arguments
from dydit.models.checkpoints.filling import load_model
from dydit.models.checkpoints.locate import locate, open_weights
from dydit.models.checkpoints.names import IDENTITY, Row, expand
from dydit.models.checkpoints.public_dit import infer_arguments
from dydit.models.checkpoints.public_dydit import has_routers
from dydit.models.checkpoints.sources import TensorSource
from dydit.models.dit import DiT


def load_backbone(
    path: str | Path,
    *,
    num_classes: int | None = None,
    on_class_mismatch: str = "error",
    num_heads: int | None = None,
    sample_size: int | Sequence[int] | None = None,
    null_class: bool | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> DiT:
    """Load a static backbone, in evaluation mode on the CPU.

    Args:
        path: a public DiT file (``.pt``: a state dict, bare or under ``ema`` or ``model``; or the same
            tensors in ``.safetensors``), a folder of this project, a folder of diffusers'
            ``DiTTransformer2DModel`` or of a pipeline around one, or a Hub id.
        num_classes: number of classes that is needed; None = as stored.
        on_class_mismatch: where another number is stored: ``error`` refuses, ``drop`` starts a fresh label
            table, of which only the null class's row is kept (logged as a warning).
        num_heads: attention heads of a public file of no published size; it cannot be read off the tensors.
        sample_size: latent size of a public file whose position embedding does not tell its grid.
        null_class: whether the last row of a public file's label table is the null class; None = yes, as in
            all published ones.
        dtype: convert the weights to it; None = as stored.
        revision: branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: missing, truncated, foreign, of another architecture, or with a tensor that is
            missing, left over, misshapen, of no float type, or not finite.
    """
    place = locate(path, revision)
    if place.is_file():
        model = _load_file(place, dtype, num_heads=num_heads, sample_size=sample_size, null_class=null_class)
    else:
        model = _load_folder(place, dtype)
        check_asked(
            str(path), model.shape, num_heads=num_heads, sample_size=sample_size, null_class=null_class
        )
    return model if num_classes is None else with_classes(model, num_classes, on_class_mismatch)


def stored_class(path: str | Path, revision: str | None = None) -> str:
    """The class of model that a file, folder or Hub id holds (``DiT``, ``DyDiT``, …), without loading it.

    Raises:
        CheckpointError: it cannot be read.
    """
    place = locate(path, revision)
    if place.is_dir():
        return read_config(place)[0]
    return "DyDiT" if has_routers(open_weights(place)) else "DiT"


def stored_sample_size(path: str | Path, revision: str | None = None) -> tuple[int, int]:
    """Height and width of the input of a static backbone, without loading it.

    Args:
        path, revision: see ``load_backbone``.

    Raises:
        CheckpointError: it cannot be read, or is no static backbone.
    """
    place = locate(path, revision)
    source = open_weights(place)
    if place.is_file():
        size = infer_arguments(_static(source, place))["sample_size"]
    else:
        class_name, settings = read_config(place)
        size = _reader(place, class_name)[0](source, settings)["sample_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _load_file(place: Path, dtype: torch.dtype | None, **asked: Any) -> DiT:
    source = _static(open_weights(place), place)
    arguments = infer_arguments(source, **asked)
    return _load_dit(source, arguments, dtype)


def _static(source: TensorSource, place: Path) -> TensorSource:
    if has_routers(source):
        raise CheckpointError(
            f"{place} holds a DyDiT", expected="a static DiT", remedy="load it with load_dydit"
        )
    return source


def _load_folder(place: Path, dtype: torch.dtype | None) -> DiT:
    class_name, settings = read_config(place)
    read_arguments, table, computed = _reader(place, class_name)
    source = open_weights(place)
    missing = [name for name in computed if name not in source.facts]
    return _load_dit(source, read_arguments(source, settings), dtype, table, missing)


def _reader(place: Path, class_name: str) -> _Reader:
    if class_name not in _FOLDERS:
        raise CheckpointError(
            f"{place} holds a {class_name}",
            expected="one of " + ", ".join(_FOLDERS),
            remedy="load it with load_dydit" if class_name == "DyDiT" else "",
        )
    return _FOLDERS[class_name]


def _load_dit(
    source: TensorSource,
    arguments: dict[str, Any],
    dtype: torch.dtype | None,
    table: Sequence[Row] = IDENTITY,
    computed: Sequence[str] = (),
) -> DiT:
    """A DiT of known arguments around stored tensors.

    Args:
        source: the tensors.
        arguments: of the constructor.
        dtype: see ``load_backbone``.
        table: our names and the source's.
        computed: our tensors that the source does not store.

    Raises:
        CheckpointError: see ``load_model``.
    """

    def entries(blueprint: Mapping[str, Any]) -> list[Any]:
        return expand(table, [name for name in blueprint if name not in computed], arguments["depth"])

    return load_model(lambda: DiT(**arguments), entries, source, dtype)


def _dit_settings(source: TensorSource, settings: dict[str, Any]) -> dict[str, Any]:
    check_arguments(source.label, DiT, settings, max_depth=len(source.facts))
    return {**defaults_of(DiT), **settings}


def _diffusers_settings(source: TensorSource, settings: dict[str, Any]) -> dict[str, Any]:
    check_arguments(source.label, DiTTransformer2DModel, settings, max_depth=len(source.facts))
    return dit_arguments(source.label, settings)


def _legacy_settings(source: TensorSource, settings: dict[str, Any]) -> dict[str, Any]:
    inert = {name for name, value in LEGACY_SETTINGS.items() if settings.get(name) == value}
    return _diffusers_settings(source, {k: v for k, v in settings.items() if k not in inert})


_ReadSettings = Callable[[TensorSource, dict[str, Any]], dict[str, Any]]

_Reader = tuple[_ReadSettings, tuple[Row, ...], tuple[str, ...]]

# Class that a folder's config names -> constructor arguments, names of the tensors, what may be missing.
_FOLDERS: dict[str, _Reader] = {
    "DiT": (_dit_settings, IDENTITY, COMPUTED),
    "DiTTransformer2DModel": (_diffusers_settings, TABLE, COMPUTED),
    "Transformer2DModel": (_legacy_settings, TABLE, COMPUTED),
}
