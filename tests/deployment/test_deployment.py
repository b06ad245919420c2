"""Deployment folders: what torch alone computes from one is what the engine computes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
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
    small_diffusers_dit,
    small_dydit,
    small_inputs,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

import dydit
from dydit.config import DyDiTConfig
from dydit.deployment import loader
from dydit.deployment.folder import compile_programs, tensors_of, write_deployment
from dydit.deployment.loader import Deployment
from dydit.deployment.programs import export_programs
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


def side_by_side(model: DyDiT, seed: int = 0) -> SubnetSchedule:
    """Heads and groups that are one run each, anywhere and of any length from 1."""
    rng = np.random.default_rng(seed)

    def runs(count: int) -> Any:
        first = rng.integers(0, count, (len(STEPS), model.shape.depth, 1))
        where = np.arange(count)
        return (first <= where) & (where < rng.integers(first + 1, count + 1))

    route_widths(model, STEPS, runs(model.shape.num_heads), runs(model.shape.mlp_groups))
    return SubnetSchedule.from_model(model, STEPS)


def deployed(folder: Path, model: DyDiT, schedule: SubnetSchedule) -> Deployment:
    write_deployment(folder, model, schedule)
    return Deployment(folder)


@dataclass
class Shipped:
    """A model, its schedule with capacities, and a folder of theirs."""

    model: DyDiT
    schedule: SubnetSchedule
    folder: Path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """Once for all tests, as tracing takes seconds."""
    model, folder = small_dydit(0, mixed=False), tmp_path_factory.mktemp("deployment")
    schedule = routed(model, capacities=True)
    deployed(folder, model, schedule)
    return Shipped(model, schedule, folder)


@pytest.fixture
def shipped(written: Shipped, tmp_path: Path) -> Shipped:
    """A copy, to change at will."""
    return replace(written, folder=shutil.copytree(written.folder, tmp_path / "deployment"))


def copies(found: Deployment, pack: dict[str, Any]) -> int:
    """Bytes of what is not in the memory of the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in found.weights.values()}
    tensors = [leaf for leaf in tree_leaves(pack) if isinstance(leaf, torch.Tensor)]
    return sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() not in weights)


def slices(found: Deployment, model: DyDiT) -> Iterator[dict[str, Any]]:
    """What the blocks run on at each timestep, in a sampling run of one sample."""
    x, y = small_inputs(model.shape, batch=1)
    for t in STEPS:
        found(x, t, y)
        yield from found.packs.values()


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
    model = dydit.convert(small_diffusers_dit(), DyDiTConfig(token_router_ratio=4))
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


COMPILED = {
    "2 heads": partial(small_dydit, 0, mixed=False, num_heads=2),
    "diffusers": lambda: dydit.convert(small_diffusers_dit(), DyDiTConfig(token_router_ratio=4)),
    **{name: partial(small_dydit, 0, mixed=False, conditioning=name) for name in CONDITIONINGS},
}
IN_CI = ("2 heads",)  # each takes minutes on a slow machine


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=name, marks=() if name in IN_CI else pytest.mark.exhaustive)
        for name, model in COMPILED.items()
    ],
)
def test_aot_inductor_computes_the_same(tmp_path: Path, model: Any) -> None:
    model = model()
    schedule = routed(model, capacities=True)
    compile_programs(tmp_path, write_deployment(tmp_path, model, schedule))
    found = Deployment(tmp_path, compiled=True)
    # Generated code has its own, coarser exponentials.
    check(found, model, schedule, tolerance=1e-4)
    x, y = small_inputs(model.shape)
    y = y[:1].repeat(len(x), *[1] * (y.ndim - 1))
    strided = x.to(memory_format=torch.channels_last), STEPS[1], y[:1].expand_as(y)
    assert torch.equal(found(*strided), found(x, STEPS[1], y))
    path = tmp_path / "programs" / "embed.cpu.pt2"
    change_a_byte(path, len(path.read_bytes()) // 2)
    with pytest.raises(ValueError, match=r"embed.cpu.pt2 with sha256 \w{12}…; expected"):
        Deployment(tmp_path, compiled=True)
    Deployment(tmp_path)  # which reads the portable ones


LONE = """
import sys
for name in ("dydit", "safetensors", "diffusers", "timm", "accelerate", "transformers", "pydantic"):
    sys.modules[name] = None  # an import of it fails
import torch
from run import Deployment
x, y = torch.load(sys.argv[1])
torch.save(Deployment(".")(x, float(sys.argv[2]), y), sys.argv[3])
"""


def test_it_runs_in_a_process_with_torch_alone(shipped: Shipped, tmp_path: Path) -> None:
    x, y = small_inputs(shipped.model.shape)
    torch.save((x, y), tmp_path / "inputs.pt")
    arguments = [str(tmp_path / "inputs.pt"), str(STEPS[1]), str(tmp_path / "output.pt")]
    subprocess.run([sys.executable, "-c", LONE, *arguments], cwd=shipped.folder, check=True)
    expected = SubnetEngine(shipped.model, shipped.schedule, mode="capacity")(x, STEPS[1], y)
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


@pytest.mark.parametrize("separate", [False, True])
def test_components_side_by_side_are_views(tmp_path: Path, separate: bool) -> None:
    config = DyDiTConfig(token_router_ratio=4, mlp_groups=8, always_on=False)
    model = (
        dydit.convert(small_diffusers_dit(), config)
        if separate
        else small_dydit(0, config, mixed=False, num_heads=8)
    )
    schedule = side_by_side(model)
    found = deployed(tmp_path, model, schedule)
    assert ("attend_of_run" in found.programs) != separate
    check(found, model, schedule)
    assert not any(copies(found, pack) for pack in slices(found, model))


def test_compiled_programs_get_columns_as_a_copy_has_them(tmp_path: Path) -> None:
    model = small_dydit(0, DyDiTConfig(token_router_ratio=4, mlp_groups=8, always_on=False), mixed=False)
    schedule = side_by_side(model)
    found = deployed(tmp_path, model, schedule)
    found.compiled = True
    check(found, model, schedule)
    for pack in slices(found, model):
        assert all(leaf.is_contiguous() for leaf in tree_leaves(pack) if isinstance(leaf, torch.Tensor))


def test_a_block_keeps_the_slices_of_its_last_mask(written: Shipped) -> None:
    model, schedule, found = written.model, written.schedule, Deployment(written.folder)
    x, y = small_inputs(model.shape)
    found(x, STEPS[0], y)
    packs = dict(found.packs)
    found(x, STEPS[0], y)
    assert all(found.packs[i] is pack for i, pack in packs.items())
    found(x, STEPS[2], y)
    same = (schedule.rows[0] == schedule.rows[2]).tolist()
    assert [found.packs[i] is packs[i] for i in range(model.shape.depth)] == same and not all(same)


def test_old_slices_go_before_new_ones_take_memory(written: Shipped, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = written.model, Deployment(written.folder)
    make, old = Deployment._cut, dict[str, list[weakref.ref[Any]]]()

    def watched(self: Deployment, weight: str, *cut: Any) -> Any:
        if weight.endswith("fc1.weight"):  # once per block and mask
            assert not any(ref() is not None for ref in old.get(weight, ()))
        made = make(self, weight, *cut)
        old.setdefault(weight, []).append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(Deployment, "_cut", watched)
    x, y = small_inputs(model.shape)
    for t in STEPS:
        found(x, t, y)
    made = [len(refs) for weight, refs in old.items() if weight.endswith("fc1.weight")]
    assert len(made) == model.shape.depth and min(made) > 1


def test_two_threads(written: Shipped) -> None:
    """Each wants other slices than the other."""
    found = Deployment(written.folder)
    x, y = small_inputs(written.model.shape)
    expected = {t: found(x, t, y) for t in STEPS}

    def run(steps: list[float]) -> bool:
        return all(torch.equal(found(x, t, y), expected[t]) for t in 4 * steps)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, (STEPS, STEPS[::-1])))


def test_two_heads(tmp_path: Path) -> None:
    model = small_dydit(0, DyDiTConfig(token_router_ratio=4, always_on=False), mixed=False, num_heads=2)
    schedule = routed(model, capacities=False)
    programs = export_programs(model, schedule).programs
    assert sorted(programs)[:3] == ["attend", "attend_of_one_head", "attend_without_heads"]
    _, _, _, (qkv, _) = programs["attend"].example_inputs[0]
    assert qkv[0].shape == (3 * 32, 32)  # both heads: one has other strides
    check(deployed(tmp_path, model, schedule), model, schedule)


def test_the_device_is_the_folders_own(shipped: Shipped, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shipped.folder
    assert Deployment(folder).device == torch.device("cpu")
    for device in ("cpu", "meta"):
        refused = rf"no .*\.{device}\.pt2; expected compiled programs; leave out compiled=True, or export"
        with pytest.raises(ValueError, match=refused):
            Deployment(folder, device=device, compiled=True)
    plan = folder / "deployment.json"
    plan.write_text(plan.read_text().replace('"device": "cpu"', '"device": "cuda:0"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match='device cuda; expected one .*; give device="cpu"'):
        Deployment(folder, verify=False)
    with pytest.raises(ValueError, match=r"no .*\.cpu\.pt2; expected compiled programs; leave out compiled"):
        Deployment(folder, device="cpu", compiled=True, verify=False)
    check(Deployment(folder, device="cpu", verify=False), shipped.model, shipped.schedule)


@pytest.mark.parametrize(
    ("device", "made_on", "moved"),
    [("cpu", "cpu", False), ("cuda:0", "cuda:0", False), ("cuda:1", "cuda:0", True), ("cuda:0", "cpu", True)],
)
def test_programs_move_to_another_device(
    written: Shipped, monkeypatch: pytest.MonkeyPatch, device: str, made_on: str, moved: bool
) -> None:
    found = Deployment(written.folder)
    found.device, found.plan["device"] = torch.device(device), made_on
    to: list[torch.device] = []

    def moved_to(program: Any, where: torch.device) -> Any:
        to.append(where)
        return program

    monkeypatch.setattr(loader, "move_to_device_pass", moved_to)
    found._load("programs/decode")
    assert to == ([torch.device(device)] if moved else [])


def test_weights_of_every_dtype_are_read(shipped: Shipped) -> None:
    """Of another file in the place of the weights, as safetensors writes it with words in its header."""
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3.0).half(),
        "d": torch.arange(4, dtype=torch.int64), "e": torch.zeros(0, 3),
    }  # fmt: skip
    file, plan = shipped.folder / "weights.safetensors", shipped.folder / "deployment.json"
    save_file(tensors, file, metadata={"made": "here"})
    content = json.loads(plan.read_text())
    plan.write_text(json.dumps({**content, "weights": {file.name: tensors_of(file)}}))
    found = Deployment(shipped.folder, verify=False).weights
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.float())


def change_a_byte(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


FILES = ("weights.safetensors", "deployment.json", "programs/embed.pt2", "programs/decode.pt2")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["a byte", "the end"])
def test_a_file_that_was_changed_or_cut_off_is_refused(shipped: Shipped, name: str, change: str) -> None:
    path = shipped.folder / name
    if change == "a byte":
        change_a_byte(path, len(path.read_bytes()) // 2)
    else:
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=rf"{name} with sha256 \w{{12}}…; expected \w{{12}}… as written; .*export again"
    ):
        Deployment(shipped.folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("empty", [False, True])
def test_a_missing_or_empty_file_is_told(shipped: Shipped, name: str, empty: bool) -> None:
    path = shipped.folder / name
    path.unlink()
    if empty:
        path.touch()
    for verify in (False, True):
        with pytest.raises(ValueError, match=rf"no .*{path.name}, or an empty one; .*copy the folder again"):
            Deployment(shipped.folder, verify=verify)


def test_weights_that_were_cut_off_are_told_without_their_sum(shipped: Shipped) -> None:
    path = shipped.folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"ends within [\w.]+; expected [\d,]+ bytes; copy the folder again"):
        Deployment(shipped.folder, verify=False)


@pytest.mark.parametrize("left", [0, 1])
def test_sums_that_were_cut_off_are_told(shipped: Shipped, left: int) -> None:
    path = shipped.folder / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:left]))
    told = "deployment.json with sha256 .*expected no line of" if left else "no .*SHA256SUMS, or an empty one"
    with pytest.raises(ValueError, match=told):
        Deployment(shipped.folder)


def test_the_sums_are_those_of_the_standard_tool(shipped: Shipped) -> None:
    names = [line.split("  ")[1] for line in (shipped.folder / "SHA256SUMS").read_text().splitlines()]
    programs = [f"programs/{path.name}" for path in (shipped.folder / "programs").iterdir()]
    assert sorted(names) == sorted({*FILES, "run.py", *programs})
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum on this machine")
    done = subprocess.run([tool, "--check", "--quiet", "SHA256SUMS"], cwd=shipped.folder, check=False)
    assert done.returncode == 0


def test_weights_are_read_unchecked_where_that_is_asked_for(shipped: Shipped) -> None:
    change_a_byte(shipped.folder / "weights.safetensors")
    Deployment(shipped.folder, verify=False)


def test_other_latents_are_refused(written: Shipped) -> None:
    found = Deployment(written.folder)
    x, y = small_inputs(written.model.shape)
    for wrong in (x.double(), x[..., :4]):
        with pytest.raises(
            ValueError, match=r"latents of torch.float.*; expected torch.float32, \(3, 3, 8, 8\); convert"
        ):
            found(wrong, STEPS[0], y)
    with pytest.raises(ValueError, match=r"labels of torch.int64, \(2,\); expected torch.int64, \(3,\);"):
        found(x, STEPS[0], y[:2])
    with pytest.raises(ValueError, match=r"latents of .*, \(0, 3, 8, 8\); expected .*, \(1, 3, 8, 8\);"):
        found(x[:0], STEPS[0], y[:0])
    with pytest.raises(ValueError, match=r"several timesteps; expected one; make a call for each"):
        found(x, torch.full((3,), STEPS[0]), y)  # type: ignore[arg-type] # the mistake that is told
    most = written.model.shape.num_classes  # the null class
    found(x, STEPS[0], torch.tensor([0, most, most]))
    for wrong in (-1, most + 1):
        with pytest.raises(
            ValueError, match=rf"labels from .*{wrong}.*; expected 0 to {most}; choose classes"
        ):
            found(x, STEPS[0], torch.tensor([1, 1, wrong]))


def test_other_conditions_are_refused(written: Shipped, tmp_path: Path) -> None:
    found, (x, y) = Deployment(written.folder), small_inputs(written.model.shape)
    for wrong in (y.int(), y.float(), y[:, None]):
        with pytest.raises(ValueError, match=r"labels of torch\..*; expected torch.int64, \(3,\); convert"):
            found(x, STEPS[0], wrong)
    model = small_dydit(0, mixed=False, conditioning="adaln_single")
    found, (x, y) = deployed(tmp_path, model, routed(model, capacities=False)), small_inputs(model.shape)
    for wrong in (y.double(), y[:, 1:], y[..., 1:]):
        with pytest.raises(ValueError, match=r"texts of .*; expected torch.float32, \(\d+, \d+, \d+\)"):
            found(x, STEPS[0], wrong)


def test_programs_take_contiguous_inputs(written: Shipped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled ones take that on trust, and would compute something else."""
    found, (x, y) = Deployment(written.folder), small_inputs(written.model.shape)
    expected, run = found(x, STEPS[1], y[:1].repeat(len(x))), found.programs["embed"]

    def embed(weights: Any, *inputs: torch.Tensor) -> Any:
        assert all(given.is_contiguous() for given in inputs)
        return run(weights, *inputs)

    monkeypatch.setitem(found.programs, "embed", embed)
    strided = x.to(memory_format=torch.channels_last), STEPS[1], y[:1].expand(len(x))
    assert torch.equal(found(*strided), expected)


def test_a_timestep_outside_of_the_schedule_is_refused(written: Shipped) -> None:
    found = Deployment(written.folder)
    x, y = small_inputs(written.model.shape)
    with pytest.raises(ValueError, match=r"timestep 3.0; expected .* 8 \(950 … 110\); export again"):
        found(x, 3.0, y)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    model = small_dydit(0, mixed=False)
    schedule = SubnetSchedule.from_model(model, STEPS)
    (tmp_path / "programs").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written .*; free space, or choose an empty folder"):
        write_deployment(tmp_path, model, schedule)


def full_disk(*_args: Any, **_options: Any) -> Any:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_disk_that_is_full_for_programs_is_told_in_one_line(tmp_path: Path) -> None:
    """In a process of its own, which torch's writer of files would end."""
    code = (
        "import resource, signal, torch\n"
        "from pathlib import Path\n"
        "from core_builders import small_dydit\n"
        "from dydit.deployment.folder import write_deployment\n"
        "from dydit.errors import OutputError\n"
        "from dydit.export.schedule import SubnetSchedule\n"
        "model = small_dydit(0, mixed=False)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        f"    write_deployment(Path({str(tmp_path)!r}), model, SubnetSchedule.from_model(model, [500.0]))\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": tests},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout and "free space" in done.stdout


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dydit(0, mixed=False)
    monkeypatch.setattr("dydit.deployment.folder.save_file", full_disk)
    with pytest.raises(OutputError, match="cannot be written .*No space left on device.*; free space"):
        write_deployment(tmp_path, model, SubnetSchedule.from_model(model, STEPS[:1]))
