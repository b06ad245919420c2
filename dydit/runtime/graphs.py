"""CUDA graphs: a subnetwork's kernels recorded once and launched together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # calls before recording: compiling, packing and the libraries' own set-up


@dataclass(frozen=True)
class _Recording:
    graph: Any  # torch.cuda.CUDAGraph, which a CPU build does not have
    inputs: tuple[Tensor, ...]
    output: Tensor


class CudaGraphs:
    """Calls of functions that nothing but their inputs' values changes, recorded by key and input shapes.

    What else a recording reads (the weights) must stay where it is. One call at a time runs: recordings share
    their memory.
    """

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording] = {}
        self._lock = threading.Lock()
        self._pool: Any = None

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, all on one GPU."""
        full_key = (key, *((tuple(i.shape), i.dtype) for i in inputs))
        with self._lock:
            if full_key not in self._recordings:
                self._recordings[full_key] = self._record(function, inputs)
            recording = self._recordings[full_key]
            for held, given in zip(recording.inputs, inputs, strict=True):
                held.copy_(given)
            recording.graph.replay()
            return recording.output.clone()  # the next replay writes over it

    def clear(self) -> None:
        """Forget every recording, when what they read has moved."""
        with self._lock:
            self._recordings.clear()
            self._pool = None

    def _record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Recording:
        held = tuple(i.clone() for i in inputs)
        main, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                function(*held)
        main.wait_stream(beside)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function(*held)
        return _Recording(graph, held, output)
