"""Memory for slices: a tensor like any other, in pages of its own where it is large."""

from __future__ import annotations

import mmap
import os
from typing import Any

import pytest
import torch

from dydit.runtime import pages
from dydit.runtime.pages import LARGE, lasting

ROWS = LARGE // 128


def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the ranges that are asked for from now on."""
    sizes: list[int] = []
    ask = mmap.mmap

    def seen(number: int, size: int, **options: Any) -> mmap.mmap:
        sizes.append(size)
        return ask(number, size, **options)

    monkeypatch.setattr(pages.mmap, "mmap", seen)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [0, 3, ROWS])
def test_it_holds_what_is_written(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = mapped(monkeypatch)
    found = lasting(torch.empty(1, dtype=dtype), rows, 8, 16)
    assert found.shape == (rows, 8, 16) and found.dtype == dtype and found.is_contiguous()
    assert sizes == ([found.nbytes] if found.nbytes >= LARGE else [])
    values = torch.randn(rows, 8, 16).to(dtype)
    assert torch.equal(found.copy_(values), values)


def test_only_the_cpus_memory_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = mapped(monkeypatch)
    assert lasting(torch.empty(1, device="meta"), ROWS, 128).is_meta and not sizes


def test_where_nothing_can_be_mapped_pytorch_finds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    assert lasting(torch.empty(1), ROWS, 128).fill_(1).sum() == ROWS * 128


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child only writes, and ends
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_forked_process_writes_to_its_own() -> None:
    memory = lasting(torch.empty(1), ROWS, 128)
    memory[0, 0] = 1
    child = os.fork()
    if not child:
        memory[0, 0] = 2
        os._exit(3 if memory[0, 0].item() == 2 else 4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert memory[0, 0] == 1
