"""Streams of ``torch.cuda`` on a machine without a GPU, for tests of what only a GPU has."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch


class Stream:
    """Does all work at once, so that nobody has to wait for it."""

    def __init__(self, _device: Any = None) -> None: ...
    def wait_stream(self, _other: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def record_event(self) -> Event:
        return Event()


class Event:
    """Of such a stream: it has been."""

    def synchronize(self) -> None: ...


def stand_in_for_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``torch.cuda`` give such streams."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
