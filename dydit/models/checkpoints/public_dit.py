"""Public DiT files: a state dict and nothing else, so every number of the model is read off the tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dydit.costs import MODULATION_ROWS
from dydit.errors import CheckpointError
from dydit.models.checkpoints.sources import TensorSource
from dydit.models.embeddings import sincos_position_embedding
from dydit.models.presets import SIZES

# The number of heads leaves no trace in the tensors; published sizes have one each.
PUBLISHED_HEADS = {(size["hidden_size"], size["depth"]): size["num_heads"] for size in SIZES.values()}

# What every tensor's name of a DiT begins with.
_TOP_LEVEL = re.compile(r"(x_embedder|pos_embed|t_embedder|y_embedder|blocks|final_layer)(\.|$)")
_BLOCK = re.compile(r"blocks\.(\d{1,6})\.")

# Where no block regresses a modulation: a tensor that only this design has.
_UNMODULATED = {"cross_attention": "blocks.0.norm_cross.weight", "in_context": "blocks.0.norm1.weight"}

# float32 sines are stored to 1e-7, bfloat16 ones to 4e-3; those of another grid differ by up to 2.
_SINE_TOLERANCE = 1e-2


def is_dit(source: TensorSource) -> bool:
    """Whether tensors have the names of a DiT, all there or not."""
    return any(_TOP_LEVEL.match(name) for name in source.facts)


def infer_arguments(
    source: TensorSource,
    num_heads: int | None = None,
    sample_size: int | Sequence[int] | None = None,
    null_class: bool | None = None,
) -> dict[str, Any]:
    """Constructor arguments of the ``DiT`` that the tensors of a public file belong to.

    Args:
        source: the tensors.
        num_heads: H; None = that of the published size with this width and depth.
        sample_size: latent size; None = that of the stored position embedding.
        null_class: whether the label table's last row is the null class; None = yes, as published.

    Raises:
        CheckpointError: the tensors are no DiT's, or leave a number open.
    """
    if not is_dit(source):
        raise CheckpointError(
            f"{source.label} holds no DiT: its first tensor is {next(iter(source.facts), 'none')}",
            expected="names such as x_embedder.proj.weight and blocks.0.attn.qkv.weight",
        )
    hidden_size, in_channels, patch_size, _ = shape_of(source, "x_embedder.proj.weight", 4)
    depth, labels = _depth(source), shape_of(source, "y_embedder.embedding_table.weight", 2)[0]
    null_class = null_class is not False
    return {
        "sample_size": _sample_size(source, hidden_size, patch_size, sample_size),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": published_heads(source, hidden_size, depth) if num_heads is None else num_heads,
        "mlp_ratio": _ratio(shape_of(source, "blocks.0.mlp.fc1.weight", 2)[0], hidden_size),
        "num_classes": labels - int(null_class),
        "null_class": null_class,
        "learn_sigma": _learn_sigma(source, in_channels, patch_size),
        "conditioning": _conditioning(source, hidden_size),
    }


def shape_of(source: TensorSource, name: str, dimensions: int, smallest: int = 1) -> tuple[int, ...]:
    """The shape of a tensor that must be there.

    Raises:
        CheckpointError: it is not, or has another number of dimensions, or one below ``smallest``.
    """
    if name not in source.facts:
        raise CheckpointError(f"{source.label} lacks tensor {name}")
    shape = source.facts[name].shape
    if len(shape) != dimensions or min(shape) < smallest:
        raise CheckpointError(
            f"{source.label}: tensor {name} of shape {shape}", expected=f"{dimensions} sizes"
        )
    return shape


def _depth(source: TensorSource) -> int:
    found = {int(match[1]) for name in source.facts if (match := _BLOCK.match(name))}
    if absent := set(range(max(found, default=0) + 1)) - found:
        raise CheckpointError(f"{source.label} lacks block {min(absent)}, has {len(found)} others")
    return len(found)


def published_heads(source: TensorSource, hidden_size: int, depth: int) -> int:
    """H of the published size with this width and depth.

    Raises:
        CheckpointError: there is none, so that H must be given.
    """
    if (hidden_size, depth) not in PUBLISHED_HEADS:
        raise CheckpointError(
            f"{source.label} has {depth} blocks of width {hidden_size}, which is no published size, and the "
            "number of attention heads cannot be read off the tensors",
            remedy="pass num_heads",
        )
    return PUBLISHED_HEADS[hidden_size, depth]


def _learn_sigma(source: TensorSource, in_channels: int, patch_size: int) -> bool:
    outputs = shape_of(source, "final_layer.linear.weight", 2)[0]
    channels = in_channels * patch_size**2
    if outputs not in (channels, 2 * channels):
        raise CheckpointError(
            f"{source.label}: final_layer.linear.weight has {outputs} outputs",
            expected=f"{channels} (the latent), or {2 * channels} (with learned covariance)",
        )
    return outputs == 2 * channels


def _conditioning(source: TensorSource, hidden_size: int) -> str:
    modulation = source.facts.get("blocks.0.adaLN_modulation.1.weight")
    designs = {rows * hidden_size: name for name, rows in MODULATION_ROWS.items()}
    if modulation is not None and modulation.shape[:1] and modulation.shape[0] in designs:
        return designs[modulation.shape[0]]
    for design, mark in _UNMODULATED.items():
        if modulation is None and mark in source.facts:
            return design
    raise CheckpointError(
        f"{source.label}: the conditioning design cannot be told",
        expected="blocks.0.adaLN_modulation.1.weight with " + " or ".join(map(str, designs)) + " rows",
    )


def _ratio(whole: int, part: int) -> float:
    """A float r with int(part·r) = whole, which division alone may miss by one."""
    ratio = whole / part
    while int(part * ratio) < whole:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _sample_size(
    source: TensorSource, hidden_size: int, patch_size: int, given: int | Sequence[int] | None
) -> list[int]:
    """Latent (height, width): that of the grid whose sines the position embedding holds, else as given."""
    tokens = shape_of(source, "pos_embed", 3)[1]
    grids = list(_grids(tokens))
    told = next((grid for grid in grids if _holds_sines(source, hidden_size, grid)), None)
    size = None if told is None else [side * patch_size for side in told]
    if given is not None:
        asked = [given, given] if isinstance(given, int) else list(given)
        if size is not None and asked != size:
            raise CheckpointError(
                f"sample_size {asked} for {source.label}", expected=f"{size}, as its pos_embed has"
            )
        return asked
    if size is None and grids[0][0] != grids[0][1]:
        raise CheckpointError(
            f"{source.label}: pos_embed has {tokens} positions, which is no square, and no sines of a grid",
            remedy="pass sample_size",
        )
    return size or [side * patch_size for side in grids[0]]


def _grids(tokens: int) -> Iterator[tuple[int, int]]:
    """Every (rows, columns) with that many tokens, the nearest to a square first."""
    for rows in range(math.isqrt(tokens), 0, -1):
        if tokens % rows == 0:
            yield rows, tokens // rows
            if rows * rows != tokens:
                yield tokens // rows, rows


def _holds_sines(source: TensorSource, hidden_size: int, grid: tuple[int, int]) -> bool:
    stored = source.facts["pos_embed"]
    if stored.shape != (1, grid[0] * grid[1], hidden_size) or hidden_size % 4:
        return False
    expected = sincos_position_embedding(hidden_size, grid)
    return torch.allclose(source.read("pos_embed").float(), expected, rtol=0, atol=_SINE_TOLERANCE)
