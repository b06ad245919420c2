"""Slices made on one GPU stream and read on others, with stand-ins for streams and tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dydit.runtime.streams import Ready


class Stream:
    """Notes what it waits for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waited_for = number, list[Any]()

    def record_event(self) -> str:
        return f"what stream {self.cuda_stream} had to do"

    def wait_event(self, event: Any) -> None:
        self.waited_for.append(event)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The current stream, to be set."""
    found = SimpleNamespace(stream=Stream(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: found.stream)
    return found


def tensors(held_by: list[Stream], count: int = 2) -> list[Any]:
    return [
        SimpleNamespace(is_cuda=True, device="cuda:0", record_stream=held_by.append) for _ in range(count)
    ]


def test_the_stream_that_made_them_waits_for_nothing(current: SimpleNamespace) -> None:
    held_by: list[Stream] = []
    Ready(tensors(held_by)).on_this_stream()
    assert current.stream.waited_for == [] and held_by == []


def test_another_stream_waits_once_and_holds_their_memory(current: SimpleNamespace) -> None:
    held_by: list[Stream] = []
    ready = Ready(tensors(held_by))
    current.stream = other = Stream(2)
    for _ in range(2):
        ready.on_this_stream()
    assert other.waited_for == ["what stream 1 had to do"] and held_by == [other, other]
    current.stream = third = Stream(3)
    ready.on_this_stream()
    assert third.waited_for == ["what stream 1 had to do"] and held_by[2:] == [third, third]


def test_on_the_cpu_nobody_asks_for_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "current_stream")
    Ready([torch.ones(1)]).on_this_stream()
    Ready([]).on_this_stream()
