"""Memory of one stage after another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from core_builders import TIMESTEPS, multiply_in_one_kernel, small_dydit, small_inputs

from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine
from dydit.runtime.layers import linear
from dydit.runtime.workspace import ALIGNMENT, Workspace, Workspaces, space


def test_tensors_of_a_stage_lie_behind_each_other() -> None:
    workspace = Workspace()
    for _ in range(2):  # in the first stage there is no memory yet
        workspace.restart()
        tensors = [workspace.empty((3, 5), torch.float32), workspace.empty((7,), torch.bfloat16)]
        tensors += [workspace.empty((2, 0), torch.float64)]
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert tensors[1].data_ptr() - tensors[0].data_ptr() == ALIGNMENT
    assert [tensor.shape for tensor in tensors] == [(3, 5), (7,), (2, 0)]
    place = tensors[0].data_ptr()
    workspace.restart()
    assert workspace.empty((4,), torch.int64).data_ptr() == place


def test_what_does_not_fit_lies_elsewhere_until_the_next_stage() -> None:
    workspace = Workspace()
    workspace.restart()
    workspace.empty((16,), torch.float32)
    workspace.restart()
    small, large = workspace.empty((16,), torch.float32), workspace.empty((10**4,), torch.float32)
    small.fill_(1)
    large.fill_(2)
    assert (small == 1).all() and (large == 2).all()
    assert small.untyped_storage().data_ptr() != large.untyped_storage().data_ptr()
    workspace.restart()
    small, large = workspace.empty((16,), torch.float32), workspace.empty((10**4,), torch.float32)
    assert small.untyped_storage().data_ptr() == large.untyped_storage().data_ptr()


def test_each_user_has_one_of_their_own() -> None:
    workspaces = Workspaces()
    with workspaces.one() as first, workspaces.one() as second:
        assert first is not second
    with workspaces.one() as again:
        assert again in (first, second)
    workspaces.clear()
    with workspaces.one() as new:
        assert new not in (first, second)


def test_memory_that_there_is_not_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces = Workspaces()
    with pytest.raises(RuntimeError), workspaces.one() as first:
        first.empty((2**62,), torch.uint8)  # more than a process can address
    with workspaces.one() as workspace:
        workspace.restart()
        workspace.empty((3,), torch.uint8)
        workspace._used = 2**62
        with pytest.raises(RuntimeError):
            workspace.restart()
        workspace.restart()
        assert len(workspace.empty((3,), torch.uint8)) == 3


def test_without_a_workspace_torch_makes_the_memory() -> None:
    tensor = torch.ones(2)
    assert space(None, tensor, 3) is None
    made = space(Workspace(), tensor.half(), 3, 4)
    assert made is not None and (made.dtype, made.shape) == (torch.float16, (3, 4))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_a_workspace(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_in_one_kernel(monkeypatch, frozenset())  # which takes new memory
    layer, x = torch.nn.Linear(6, 5, bias=bias).requires_grad_(False), torch.randn(2, 3, 6)
    workspace = Workspace()
    for _ in range(2):  # the first time it has no memory yet
        workspace.restart()
        found = linear(x, (layer.weight, layer.bias), workspace)
        torch.testing.assert_close(found, layer(x))
    assert found.untyped_storage().nbytes() >= found.nbytes + ALIGNMENT // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_begun_in_inference_mode_runs_outside_of_it(dtype: torch.dtype) -> None:
    model = small_dydit()
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS), dtype)
    x, y = small_inputs(model.shape)
    x = x.to(dtype)
    with torch.inference_mode():
        expected = [engine(x, t, y) for t in TIMESTEPS]
    for first, t in zip(expected, TIMESTEPS, strict=True):
        assert torch.equal(engine(x, t, y), first)
        assert not engine(x, t, y).is_inference()


def test_an_output_is_not_written_over_by_later_calls() -> None:
    model = small_dydit()
    engine = SubnetEngine(model, SubnetSchedule.from_model(model, TIMESTEPS))
    x, y = small_inputs(model.shape)
    outputs = [engine(x, t, y) for t in TIMESTEPS]
    copies = [output.clone() for output in outputs]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda t: engine(x + 1, t, y), TIMESTEPS * 3))
    assert all(torch.equal(output, before) for output, before in zip(outputs, copies, strict=True))
