"""CUDA graphs: a subnetwork's kernels recorded once and launched together."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CAPTURING = threading.Lock()  # a process captures one at a time: a capture waits for the whole device first


@dataclass(frozen=True)
class _Recording:
    graph: Any  # torch.cuda.CUDAGraph, which a CPU build does not have
    inputs: tuple[Tensor, ...]
    output: Tensor


class CudaGraphs:
    """Calls of functions that nothing but their inputs' values changes, recorded by key and input shapes.

    The first call of a key runs as it is written, and does what happens once (compiling, packing); the second
    is recorded; from then on the recording runs. So what is called once pays for no recording. What else a
    recording reads (the weights) must stay where it is: under autocast, which makes and drops copies of them,
    nothing is recorded. What cannot be recorded (for lack of memory, or because it waits for the device) runs
    as it is written, with a warning. One call at a time runs: recordings share their memory.
    """

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording | None] = {}  # None: cannot be recorded
        self._called: set[Hashable] = set()
        self._lock = threading.Lock()
        self._pool: Any = None
        self._stream: Any = None
        self._failed: list[Any] = []  # a graph that dies clears the libraries' memory that the others read
        self._last: Any = None  # event after the last call: what comes next writes over what it read

    def __call__(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, all on one GPU."""
        if torch.is_autocast_enabled("cuda"):
            return function(*inputs)
        full_key = (key, *((tuple(i.shape), i.dtype) for i in inputs))
        with self._lock, torch.cuda.device(inputs[0].device):
            if full_key not in self._called:
                self._called.add(full_key)
                return _as_recorded(function, *inputs)
            if full_key not in self._recordings:
                self._recordings[full_key] = self._record(function, inputs)
            recording = self._recordings[full_key]
            return _as_recorded(function, *inputs) if recording is None else self._replay(recording, inputs)

    def clear(self) -> None:
        """Forget every recording, when what they read has moved."""
        with self._lock:
            if self._last is not None:
                self._last.synchronize()
            self._recordings.clear()
            self._failed.clear()
            self._called.clear()
            self._pool = self._stream = self._last = None

    def _replay(self, recording: _Recording, inputs: tuple[Tensor, ...]) -> Tensor:
        stream = torch.cuda.current_stream()
        self._after_last(stream)
        for held, given in zip(recording.inputs, inputs, strict=True):
            held.copy_(given)
        recording.graph.replay()
        output = recording.output.clone()  # the next replay writes over it
        self._last = stream.record_event()
        return output

    def _after_last(self, stream: Any) -> None:
        """Let a stream wait for the last call, which may have run on another one."""
        if self._last is not None:
            stream.wait_event(self._last)

    def _record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Recording | None:
        try:
            return self._capture(function, inputs)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"not recorded as a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)
            return None

    # Tensors made in inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Recording:
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        held = tuple(i.clone() for i in inputs)
        main = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        self._failed.append(graph)
        # Left also where a capture fails to end, which leaves torch on its stream.
        try:
            with _CAPTURING, torch.cuda.stream(self._stream):
                self._stream.wait_stream(main)
                self._after_last(self._stream)  # libraries' own memory for this stream is in the recordings
                function(*held)  # the libraries set themselves up for a stream
                # Other threads may allocate meanwhile.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    output = function(*held)
        finally:
            main.wait_stream(self._stream)  # before the inputs' memory is another's
        self._failed.remove(graph)
        return _Recording(graph, held, output)


@torch.inference_mode(False)
@torch.no_grad()
def _as_recorded(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call it in the modes in which it is captured: what is compiled now is what the capture takes."""
    return function(*inputs)
