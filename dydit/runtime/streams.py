"""Copies that one GPU stream makes and others read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Ready:
    """When tensors made on the current stream are there, and the streams that may read them.

    Others wait until they are there, and hold their memory. On the CPU there is nothing to wait for.

    Args:
        tensors: all on one device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.is_cuda]
        self._made: Any = None
        self._streams: set[int] = set()
        if self._tensors:
            stream = torch.cuda.current_stream(self._tensors[0].device)
            self._made = stream.record_event()
            self._streams.add(stream.cuda_stream)

    def on_this_stream(self) -> None:
        """Let what the current stream does next read the tensors."""
        if not self._tensors:
            return
        stream = torch.cuda.current_stream(self._tensors[0].device)
        if stream.cuda_stream not in self._streams:
            stream.wait_event(self._made)
            for tensor in self._tensors:
                tensor.record_stream(stream)  # its memory must not go to others before
            self._streams.add(stream.cuda_stream)
