"""How much memory a training step needs on one process: from the counts, and measured in a step."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dydit.config import TrainConfig

MIB = 1 << 20
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
FLOAT32_BYTES = 4
ADAM_MOMENTS = 2


def return_freed_memory() -> None:
    """Have the C library give tensors of 4 MiB and more back to the system as soon as they are freed.

    For gradient checkpointing on the CPU. glibc otherwise learns to keep them, in a heap each for forward
    and backward, and the activations that were let go stay with the process. For the whole process; other
    C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 * MIB)


@dataclass(frozen=True)
class StateMemory:
    """Bytes that training holds on to between steps and during one, without activations.

    Attributes:
        weights: the model's.
        gradients: of what is trained.
        moments: AdamW's two.
        averages: the EMA on the model's device; 0 where it lies on the CPU.
        teacher: the frozen backbone's weights, which every process has whole; 0 without one.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    teacher: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.moments + self.averages + self.teacher


def state_memory(
    model: nn.Module, train: TrainConfig, shards: int = 1, teacher: nn.Module | None = None
) -> StateMemory:
    """Memory of a model's training state on one process.

    Args:
        model: as it is before it is wrapped.
        train: says where the averages lie.
        shards: processes that FSDP cuts the state up over; 1 without it.
        teacher: the frozen backbone of a distillation.
    """
    everything = sum(p.numel() for p in model.parameters()) * FLOAT32_BYTES // shards
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * FLOAT32_BYTES // shards
    return StateMemory(
        weights=everything,
        gradients=trained,
        moments=ADAM_MOMENTS * trained,
        averages=everything if train.ema_device == "model" else 0,
        teacher=0 if teacher is None else sum(p.nbytes for p in teacher.parameters()),
    )


class _Held:
    """One tensor that a backward needs, counted as long as it is needed."""

    def __init__(self, tensor: Tensor, meter: SavedForBackward) -> None:
        self.tensor, self.meter = tensor, meter
        self.key = tensor.untyped_storage().data_ptr()
        meter.take(self.key, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.meter.release(self.key)


class SavedForBackward:
    """Measures the most bytes that autograd kept for a backward at one time, parameters left out.

    A context manager. What gradient checkpointing keeps (the inputs of the blocks, and one block's insides
    while it is repeated) is out of its sight.

    Args:
        model: whose parameters are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.peak = self._now = 0
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._held: dict[int, tuple[int, int]] = {}  # storage -> (times held, bytes)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._hooks.__exit__(*problem)

    def take(self, key: int, size: int) -> None:
        """Count a storage in."""
        times, _ = self._held.get(key, (0, 0))
        self._held[key] = (times + 1, size)
        if times == 0:
            self._now += size
            self.peak = max(self.peak, self._now)

    def release(self, key: int) -> None:
        """Count a storage out."""
        times, size = self._held.pop(key)
        if times > 1:
            self._held[key] = (times - 1, size)
        else:
            self._now -= size

    def _pack(self, tensor: Tensor) -> Any:
        own = tensor.untyped_storage().data_ptr() in self._own
        return tensor if own else _Held(tensor, self)

    def _unpack(self, held: Any) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held


def describe_state(memory: StateMemory) -> str:
    """One line: the parts and their sum."""
    told = " + ".join(f"{name} {size / MIB:.1f}" for name, size in asdict(memory).items() if size)
    return f"memory per process: {told} = {memory.total / MIB:.1f} MiB, and activations"
