"""``load_dydit``: trained dynamic models from where users have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dydit.adapters.registry import backbone_type
from dydit.config import DyDiTConfig
from dydit.dynamic.dydit import DyDiT
from dydit.errors import CheckpointError, ShapeError
from dydit.models.checkpoints.config_file import check_arguments, check_asked, read_config
from dydit.models.checkpoints.filling import load_model
from dydit.models.checkpoints.locate import locate, open_weights
from dydit.models.checkpoints.names import IDENTITY, expand
from dydit.models.checkpoints.public_dit import infer_arguments
from dydit.models.checkpoints.public_dydit import TABLE, has_routers, head_candidates, infer_routing
from dydit.models.checkpoints.sources import TensorSource
from dydit.models.fixed_positions import NAME as POSITIONS


def load_dydit(
    path: str | Path,
    *,
    num_heads: int | None = None,
    sample_size: int | Sequence[int] | None = None,
    null_class: bool | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> DyDiT:
    """Load a DyDiT, in evaluation mode on the CPU.

    Args:
        path: a public DyDiT file of either release (``.pt``: a state dict, bare or under ``ema`` or
            ``model``), a folder written by ``save_pretrained``, or a Hub id.
        num_heads: attention heads of a public file of no published size.
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
    if place.is_dir():
        model = _load_folder(place, dtype)
        check_asked(
            str(path), model.shape, num_heads=num_heads, sample_size=sample_size, null_class=null_class
        )
        return model
    source = open_weights(place)
    backbone, routing = infer_dydit(source, num_heads, sample_size, null_class)
    return load_model(
        lambda: DyDiT(
            backbone_class="DiT", backbone_config=backbone, dydit=DyDiTConfig(**routing).model_dump()
        ),
        lambda blueprint: expand(TABLE, blueprint, backbone["depth"]),
        source,
        dtype,
    )


def infer_dydit(
    source: TensorSource,
    num_heads: int | None = None,
    sample_size: int | Sequence[int] | None = None,
    null_class: bool | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the backbone and fields of ``DyDiTConfig`` of a public file.

    Raises:
        CheckpointError: the tensors are no DyDiT's, or leave a number open.
    """
    if not has_routers(source):
        raise CheckpointError(
            f"{source.label} holds no routers",
            expected="a DyDiT",
            remedy="load a static model with load_backbone and make it dynamic with convert",
        )
    if num_heads is None:
        num_heads = _told_heads(source)
    backbone = infer_arguments(source, num_heads, sample_size, null_class)
    return backbone, infer_routing(source, backbone["num_heads"], backbone["hidden_size"])


def public_state(model: DyDiT) -> dict[str, Tensor]:
    """The state dict of a DyDiT by the names of the public files.

    Raises:
        CheckpointError: its backbone is no DiT, so that its tensors have no name there.
    """
    if model.config.backbone_class != "DiT":
        raise CheckpointError(f"a DyDiT around a {model.config.backbone_class}", expected="one around a DiT")
    state = model.state_dict()
    return {entry.theirs[0]: state[entry.ours] for entry in expand(TABLE, state, model.shape.depth)}


def _told_heads(source: TensorSource) -> int | None:
    """H where the routers leave one possibility, else None: that of the published size."""
    pixels = source.facts.get("x_embedder.proj.weight")
    if pixels is None or not pixels.shape:
        return None
    candidates = head_candidates(source, pixels.shape[0])
    return candidates.pop() if len(candidates) == 1 else None


def _load_folder(place: Path, dtype: torch.dtype | None) -> DyDiT:
    class_name, settings = read_config(place)
    if class_name != DyDiT.__name__:
        raise CheckpointError(
            f"{place} holds a {class_name}",
            expected="a DyDiT",
            remedy="load a static model with load_backbone and make it dynamic with convert",
        )
    source = open_weights(place)
    _check_settings(source, settings)
    return load_model(
        lambda: DyDiT(**settings),
        lambda blueprint: expand(IDENTITY, _stored(blueprint, source), 0),
        source,
        dtype,
    )


def _stored(blueprint: Mapping[str, Tensor], source: TensorSource) -> list[str]:
    """Names of our tensors without the fixed positions where a file leaves them out: they are computed."""
    computed = f"backbone.{POSITIONS}"
    return [name for name in blueprint if name != computed or name in source.facts]


def _check_settings(source: TensorSource, settings: Mapping[str, Any]) -> None:
    """Refuse a config with anything in it that a DyDiT or its backbone does not take."""
    label, limit = source.label, len(source.facts)
    check_arguments(label, DyDiT, settings, max_depth=limit)
    for name in ("backbone_class", "backbone_config", "dydit"):
        if name not in settings:
            raise CheckpointError(f"{label}: config.json lacks {name}", remedy="copy or download it again")
    try:
        backbone: type[nn.Module] = backbone_type(settings["backbone_class"])
    except ShapeError as error:
        raise CheckpointError(f"{label}: {error}") from error
    check_arguments(label, backbone, settings["backbone_config"], max_depth=limit)
