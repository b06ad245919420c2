"""Deployment folders: what torch alone computes from one is what the engine computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_builders import (
    random_masks,
    randomize,
    relative_error,
    route_tokens,
    route_widths,
    small_dydit,
    small_inputs,
)
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

import dydit
from dydit.config import DyDiTConfig
from dydit.deployment.folder import compile_programs, write_deployment
from dydit.deployment.loader import Deployment, read_safetensors
from dydit.dynamic.dydit import DyDiT
from dydit.errors import OutputError
from dydit.export.schedule import SubnetSchedule
from dydit.runtime.engine import SubnetEngine
from dydit.shapes import CONDITIONINGS

STEPS = [float(t) for t in range(950, 0, -120)]  # 8 timesteps
DESIGNS = [
    pytest.param(name, marks=() if name == "adaln_zero" else pytest.mark.slow) for name in CONDITIONINGS
]


def routed(model: DyDiT, capacities: bool, seed: int = 0) -> SubnetSchedule:
    """Random widths, one head and no head among them, and a schedule with or without capacities."""
    shape = model.shape
    heads, groups = random_masks(seed, len(STEPS), shape, model.routing_config.always_on)
    if not model.routing_config.always_on:
        heads[0, 0] = groups[1, 0] = False
    heads[2, 0], heads[3, 0], groups[3, 0] = np.arange(shape.num_heads) == 0, True, True
    route_widths(model, STEPS, heads, groups)
    x, y = small_inputs(shape, batch=2)
    route_tokens(model, x, STEPS[0], y)
    numbers = np.random.default_rng(seed).integers(0, shape.tokens + 1, (len(STEPS), shape.depth))
    numbers[0, 0], numbers[1, 0], numbers[2, 0] = 0, 1, shape.tokens
    return SubnetSchedule.from_model(model, STEPS, capacities=numbers if capacities else None)


def deployed(folder: Path, model: DyDiT, schedule: SubnetSchedule) -> Deployment:
    schedule.save(folder)
    write_deployment(folder, model, schedule)
    return Deployment(folder)


def check(found: Any, model: DyDiT, schedule: SubnetSchedule, tolerance: float = 1e-5) -> None:
    engine = SubnetEngine(model, schedule, mode="exact" if schedule.capacities is None else "capacity")
    for batch in (1, 2, 5):
        x, y = small_inputs(model.shape, batch=batch)
        x = x.to(next(model.parameters()).dtype)
        for t in STEPS:
            assert relative_error(found(x, t, y), engine(x, t, y)) < tolerance


@pytest.mark.parametrize("capacities", [False, True])
@pytest.mark.parametrize("conditioning", DESIGNS)
def test_the_folder_computes_what_the_engine_does(
    tmp_path: Path, conditioning: str, capacities: bool
) -> None:
    config = DyDiTConfig(token_router_ratio=4, mlp_groups=8, always_on=False)
    model = small_dydit(0, config, mixed=False, conditioning=conditioning)
    schedule = routed(model, capacities)
    check(deployed(tmp_path, model, schedule), model, schedule)


def test_without_token_routers(tmp_path: Path) -> None:
    model = small_dydit(0, DyDiTConfig(token_routing=False), mixed=False)
    heads, groups = random_masks(0, len(STEPS), model.shape)
    route_widths(model, STEPS, heads, groups)
    schedule = SubnetSchedule.from_model(model, STEPS)
    check(deployed(tmp_path, model, schedule), model, schedule)


@pytest.mark.parametrize("capacities", [False, True])
def test_a_diffusers_model(tmp_path: Path, capacities: bool) -> None:
    backbone = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    randomize(backbone)
    model = dydit.convert(backbone.eval(), DyDiTConfig(token_router_ratio=4))
    schedule = routed(model, capacities)
    check(deployed(tmp_path, model, schedule), model, schedule)


def test_half_precision(tmp_path: Path) -> None:
    """With all tokens or none: rounding, which differs here and there, would decide between close scores."""
    model = small_dydit(0, mixed=False)
    schedule = routed(model, capacities=True)
    assert schedule.capacities is not None
    all_or_none = np.where(schedule.capacities < 8, 0, model.shape.tokens)
    half = torch.nn.Module.to(model, torch.bfloat16)
    schedule = SubnetSchedule.from_model(half, STEPS, capacities=all_or_none)
    check(deployed(tmp_path, half, schedule), half, schedule, tolerance=2e-2)


@pytest.mark.slow
def test_aot_inductor_computes_the_same(tmp_path: Path) -> None:
    model = small_dydit(0, mixed=False)
    schedule = routed(model, capacities=True)
    schedule.save(tmp_path)
    compile_programs(tmp_path, write_deployment(tmp_path, model, schedule))
    # Generated code has its own, coarser exponentials.
    check(Deployment(tmp_path, compiled=True), model, schedule, tolerance=1e-4)


LONE = """
import sys
for name in ("dydit", "safetensors", "diffusers", "timm", "accelerate", "transformers", "pydantic"):
    sys.modules[name] = None  # an import of it fails
import torch
from run import Deployment
x, y = torch.load(sys.argv[1])
torch.save(Deployment(".")(x, float(sys.argv[2]), y), sys.argv[3])
"""


def test_it_runs_in_a_process_with_torch_alone(tmp_path: Path) -> None:
    model = small_dydit(0, mixed=False)
    schedule = routed(model, capacities=True)
    folder = tmp_path / "deployment"
    folder.mkdir()
    deployed(folder, model, schedule)
    x, y = small_inputs(model.shape)
    torch.save((x, y), tmp_path / "inputs.pt")
    arguments = [str(tmp_path / "inputs.pt"), str(STEPS[1]), str(tmp_path / "output.pt")]
    subprocess.run([sys.executable, "-c", LONE, *arguments], cwd=folder, check=True)
    expected = SubnetEngine(model, schedule, mode="capacity")(x, STEPS[1], y)
    assert relative_error(torch.load(tmp_path / "output.pt"), expected) < 1e-5


def test_250_timesteps_take_no_more_programs_than_a_few(tmp_path: Path) -> None:
    steps = [float(t) for t in range(999, -1, -4)]
    model = small_dydit(0, DyDiTConfig(token_router_ratio=4, mlp_groups=8), mixed=False)
    randomize(model.dynamic_blocks, 3, std=1.0)
    schedule = SubnetSchedule.from_model(model, steps)
    assert len(steps) == 250 and min(schedule.subnetworks_by_block) > 5
    deployed(tmp_path, model, schedule)
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sizes["weights.safetensors"] < weights + 50_000
    # Whatever the model's size: no weight is in a program.
    assert sum(sizes.values()) - sizes["weights.safetensors"] < 400_000


def test_slices_stay_below_the_budget(tmp_path: Path) -> None:
    model = small_dydit(0, mixed=False)
    schedule = routed(model, capacities=False)
    found = deployed(tmp_path, model, schedule)
    found.budget = 40_000
    check(found, model, schedule)
    assert 0 < sum(pack["bytes"] for pack in found.packs.values()) <= found.budget


@pytest.fixture
def tensors() -> Iterator[dict[str, torch.Tensor]]:
    yield {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3.0).half(),
        "d": torch.arange(4, dtype=torch.int64), "e": torch.zeros(0, 3),
    }  # fmt: skip


def test_the_reader_of_weights_reads_what_safetensors_writes(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made": "here"})
    found, expected = read_safetensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_a_file_that_was_cut_off_is_told(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EOFError, match="ends within"):
        read_safetensors(path)


def test_a_timestep_outside_of_the_schedule_is_refused(tmp_path: Path) -> None:
    model = small_dydit(0, mixed=False)
    found = deployed(tmp_path, model, routed(model, capacities=False))
    with pytest.raises(ValueError, match=r"timestep 3.0; the folder holds 950.0, 830.0, "):
        found(*small_inputs(model.shape)[:1], 3.0, small_inputs(model.shape)[1])


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    model = small_dydit(0, mixed=False)
    schedule = SubnetSchedule.from_model(model, STEPS)
    (tmp_path / "programs").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        write_deployment(tmp_path, model, schedule)
