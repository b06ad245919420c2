"""Copies in another number format."""

from __future__ import annotations

import copy
from typing import Any

import torch
from core_builders import small_dydit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dydit.precision import converted_copy


class NewTensors(TorchDispatchMode):
    """Bytes of what operations return in a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.bytes = dtype, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if "detach" not in str(func):
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors if t.dtype == self.dtype)
        return output


def test_a_converted_copy_is_what_converting_a_copy_gives() -> None:
    model = small_dydit()
    with NewTensors(torch.float32) as new:
        found = converted_copy(model, torch.bfloat16)
    assert new.bytes == 0  # no copy in the old dtype, not even for a moment
    expected = nn.Module.to(copy.deepcopy(model), torch.bfloat16).state_dict()
    state = found.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in state)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_converted_copy_shares_what_the_model_shares_and_leaves_whole_numbers() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    model[0].bias.requires_grad = False
    model.register_buffer("steps", torch.tensor([3]))
    found = converted_copy(model, torch.float64)
    assert found[1].weight is found[0].weight is not model[0].weight
    assert not found[0].bias.requires_grad and found[1].bias.requires_grad
    assert found.steps.dtype == torch.int64 and found.steps.data_ptr() != model.steps.data_ptr()
