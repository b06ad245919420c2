"""Tensors in one range of memory."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dydit.runtime.arena import ALIGNMENT, Arena

BYTES = torch.uint8


def place(arena: Arena, size: int) -> Tensor:
    tensor = arena.empty((size,), BYTES)
    assert tensor is not None
    return tensor


@given(st.lists(st.one_of(st.integers(1, 700), st.integers(-20, -1)), max_size=80))
def test_tensors_never_overlap_and_their_places_come_back(steps: list[int]) -> None:
    """A positive number allocates as many bytes, a negative one lets some go, with gaps between."""
    arena, alive, number = Arena(4096), [], 0
    for step in steps:
        if step < 0:
            tensor = kept = None
            del alive[: min(-step, len(alive)) : 2]
            continue
        tensor = arena.empty((step,), BYTES)
        taken = sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t, _ in alive)
        if tensor is None:
            assert alive and taken + step > 4096 // (len(alive) + 1)  # no gap was large enough
        else:
            number += 1
            alive.append((tensor.fill_(number % 256), number % 256))
        for kept, value in alive:
            assert (kept == value).all() and kept.data_ptr() % ALIGNMENT == 0
    alive.clear()
    tensor = kept = None
    assert arena.empty((4096,), BYTES) is not None  # all in one piece again


def test_a_tensor_has_a_storage_of_its_own() -> None:
    arena = Arena(1000)
    one, other = arena.empty((3, 5), torch.bfloat16), arena.empty((2,), torch.float32)
    assert one is not None and other is not None
    assert one.shape == (3, 5) and one.dtype == torch.bfloat16 and one.is_contiguous()
    assert one.untyped_storage().nbytes() == 30 and one.storage_offset() == 0 and not one._is_view()
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_nothing_needs_no_place() -> None:
    tensor = Arena(0).empty((4, 0), torch.bfloat16)
    assert tensor is not None and tensor.shape == (4, 0) and tensor.dtype == torch.bfloat16


def test_a_view_keeps_the_place() -> None:
    arena = Arena(2 * ALIGNMENT)
    tensor = place(arena, ALIGNMENT)
    view = tensor.unflatten(0, (2, -1))[1]
    del tensor
    place(arena, ALIGNMENT)
    assert arena.empty((2 * ALIGNMENT,), BYTES) is None
    del view
    gc.collect()
    assert arena.empty((2 * ALIGNMENT,), BYTES) is not None


def test_a_tensor_outlives_its_arena() -> None:
    arena = Arena(ALIGNMENT)
    tensor = place(arena, ALIGNMENT).fill_(7)
    del arena
    gc.collect()
    assert (tensor == 7).all()


def test_tensors_may_go_in_another_thread() -> None:
    arena = Arena(100 * ALIGNMENT)
    held = [place(arena, ALIGNMENT) for _ in range(100)]
    threads = [threading.Thread(target=lambda: [held.pop() for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place(arena, 100 * ALIGNMENT).nbytes == 100 * ALIGNMENT


def test_a_range_that_there_is_not() -> None:
    with pytest.raises(RuntimeError):
        Arena(2**60)
