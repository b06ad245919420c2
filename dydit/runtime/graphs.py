"""CUDA graphs: a subnetwork's kernels recorded once and launched together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Recording:
    graph: Any  # torch.cuda.CUDAGraph, which a CPU build does not have
    inputs: tuple[Tensor, ...]
    output: Tensor


class CudaGraphs:
    """Calls of functions that nothing but their inputs' values changes, recorded by key and input shapes.

    The first call of a key runs as it is written, and does what happens once (compiling, packing); the second
    is recorded; from then on the recording runs. So what is called once pays for no recording. What else a
    recording reads (the weights) must stay where it is. One call at a time runs: recordings share their
    memory.
    """

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording | None] = {}  # None: called once so far
        self._lock = threading.Lock()
        self._pool: Any = None
        self._stream: Any = None
        self._last: Any = None  # event after the last call: what comes next writes over what it read

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, all on one GPU."""
        full_key = (key, torch.is_autocast_enabled("cuda"), *((tuple(i.shape), i.dtype) for i in inputs))
        with self._lock, torch.cuda.device(inputs[0].device):
            if full_key not in self._recordings:
                self._recordings[full_key] = None
                return function(*inputs)
            recording = self._recordings[full_key]
            if recording is None:
                recording = self._recordings[full_key] = self._record(function, inputs)
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)  # which may have run on another stream
            for held, given in zip(recording.inputs, inputs, strict=True):
                held.copy_(given)
            recording.graph.replay()
            output = recording.output.clone()  # the next replay writes over it
            self._last = stream.record_event()
            return output

    def clear(self) -> None:
        """Forget every recording, when what they read has moved."""
        with self._lock:
            self._recordings.clear()
            self._pool = self._stream = self._last = None

    # Tensors made in inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Recording:
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        held = tuple(i.clone() for i in inputs)
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            function(*held)  # the libraries set themselves up for a stream
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            output = function(*held)
        main.wait_stream(self._stream)
        return _Recording(graph, held, output)
