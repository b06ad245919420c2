"""Stored tensors -> a model: every name, shape, dtype and value is checked before the model exists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm import tqdm

from dydit.errors import CheckpointError
from dydit.models.checkpoints.names import Entry
from dydit.models.checkpoints.sources import TensorSource, first_line

M = TypeVar("M", bound=nn.Module)

# Weights of a network that computes; integers and 8-bit floats would need a scale that no file here has.
DTYPES = ("float16", "bfloat16", "float32", "float64")

# Computed buffers up to this many values are built whatever the size of the weights: 128 MB in float64.
SMALL_BUFFER = 2**24


def load_model(
    build: Callable[[], M],
    entries_of: Callable[[Mapping[str, Tensor]], list[Entry]],
    source: TensorSource,
    dtype: torch.dtype | None = None,
) -> M:
    """Build a model around stored tensors, which become its parameters: one copy of the weights in memory.

    Args:
        build: makes the model, with whatever weights.
        entries_of: our tensors (name -> blueprint) -> where each comes from. A buffer that no entry names
            keeps the value that it was built with.
        source: the stored tensors; each must be named by an entry.
        dtype: convert the weights to it; None = as stored.

    Raises:
        CheckpointError: the model cannot be built, or a tensor is missing, left over, of another shape,
            not of a float type, or holds NaN or infinity.
    """
    with torch.device("meta"):
        blueprint = _built(build, source)
    entries = entries_of(blueprint.state_dict())
    check_names(source, [name for entry in entries for name in entry.theirs])
    _check_shapes(source, entries, blueprint.state_dict())
    _check_dtypes(source, entries, {name for name, _ in blueprint.named_buffers()}, dtype)
    _check_computed(source, entries, blueprint)
    with init_empty_weights():
        model = _built(build, source)
    state = dict(_read_all(source, entries, dtype))
    # Buffers that are computed, not stored, keep their values; what is neither would surface here.
    kept = {name: t for name, t in model.state_dict().items() if name not in state and not t.is_meta}
    model.load_state_dict({**kept, **state}, assign=True)
    return model.eval()


def check_names(source: TensorSource, wanted: Sequence[str]) -> None:
    """Refuse a source that lacks a wanted tensor or holds another.

    Raises:
        CheckpointError: names what is missing and what is left over.
    """
    missing, left_over = sorted(set(wanted) - set(source.facts)), sorted(set(source.facts) - set(wanted))
    problems = []
    if missing:
        problems.append(f"lacks tensor {_abridged(missing)}")
    if left_over:
        problems.append(f"holds unknown tensor {_abridged(left_over)}")
    if not problems:
        return
    near = get_close_matches(missing[0], left_over, n=1) if missing else []
    remedy = f"is {near[0]} another name of {missing[0]}?" if near else ""
    raise CheckpointError(f"{source.label} {' and '.join(problems)}", remedy=remedy)


def _built(build: Callable[[], M], source: TensorSource) -> M:
    try:
        return build()
    except CheckpointError:
        raise
    except Exception as error:  # constructors raise whatever their arguments lead to
        raise CheckpointError(
            f"{source.label} describes a model that cannot be built ({first_line(error)})"
        ) from error


def _check_shapes(source: TensorSource, entries: list[Entry], blueprint: Mapping[str, Tensor]) -> None:
    for entry in entries:
        expected = entry.relation.part_shape(tuple(blueprint[entry.ours].shape), len(entry.theirs))
        for name in entry.theirs:
            if (seen := source.facts[name].shape) != expected:
                raise CheckpointError(
                    f"{source.label}: tensor {name} of shape {seen}", expected=str(expected)
                )


def _check_dtypes(
    source: TensorSource, entries: list[Entry], buffers: set[str], dtype: torch.dtype | None
) -> None:
    """Every tensor a float, and all parameters of one type unless they are converted to one."""
    first: tuple[str, str] | None = None
    for entry in entries:
        for name in entry.theirs:
            seen = source.facts[name].dtype
            if seen not in DTYPES:
                raise CheckpointError(
                    f"{source.label}: tensor {name} of dtype {seen}", expected="one of " + ", ".join(DTYPES)
                )
            if dtype is not None or entry.ours in buffers:
                continue
            first = first or (name, seen)
            if seen != first[1]:
                raise CheckpointError(
                    f"{source.label}: tensor {name} of dtype {seen}",
                    expected=f"{first[1]}, as {first[0]} has",
                    remedy="pass dtype=torch.float32 to convert all of them",
                )


def _check_computed(source: TensorSource, entries: list[Entry], blueprint: nn.Module) -> None:
    """Refuse buffers that are computed, such as positions, out of proportion to the stored weights."""
    stored = {entry.ours for entry in entries}
    limit = max(SMALL_BUFFER, sum(math.prod(facts.shape) for facts in source.facts.values()) // 8)
    for name, buffer in blueprint.named_buffers():
        if name not in stored and buffer.numel() > limit:
            raise CheckpointError(
                f"{source.label}: its config asks for {name} of shape {tuple(buffer.shape)}",
                expected=f"at most {limit} values beside these weights",
                remedy="check sample_size and patch_size",
            )


def _read_all(
    source: TensorSource, entries: list[Entry], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    seen_at: set[int] = set()
    # The bar shows only where reading takes longer than a second.
    for entry in tqdm(entries, desc=f"reading {source.label}", unit="tensor", delay=1.0, leave=False):
        tensor = entry.relation.join((name, _read(source, name)) for name in entry.theirs)
        tensor = tensor.contiguous() if dtype is None else tensor.contiguous().to(dtype)
        if tensor.data_ptr() in seen_at:  # two names for the same memory would train as one
            tensor = tensor.clone()
        seen_at.add(tensor.data_ptr())
        yield entry.ours, tensor


def _read(source: TensorSource, name: str) -> Tensor:
    """A tensor of finite values.

    Raises:
        CheckpointError: it cannot be read, or holds NaN or infinity.
    """
    tensor = source.read(name)
    # The extremes show NaN and infinity, and need no memory beside the tensor. A router may have no score.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        count = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise CheckpointError(
            f"{source.label}: {count} values of tensor {name} are NaN or infinite",
            expected="finite weights",
            remedy="take a checkpoint from before the run diverged",
        )
    return tensor


def _abridged(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
