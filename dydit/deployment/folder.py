"""The folder that ``dydit export --aot`` writes: programs, weights, what each timestep runs, the loader."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.export import ExportedProgram
from tqdm import tqdm

from dydit.deployment import loader
from dydit.deployment.programs import Programs, export_programs
from dydit.deployment.slices import mask_slices
from dydit.dynamic.dydit import DyDiT
from dydit.errors import OutputError
from dydit.export.schedule import SubnetSchedule
from dydit.files import sha256_of, write_file
from dydit.routing.gates import logit

WEIGHTS, PLAN, LOADER, PROGRAMS = "weights.safetensors", "deployment.json", "run.py", "programs"
SUMS = "SHA256SUMS"
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
TYPES |= {"I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool"}


def write_deployment(
    folder: Path, model: DyDiT, schedule: SubnetSchedule, weights: Sequence[str] = ()
) -> Programs:
    """Write the schedule, its programs, the weights that they share, and what runs them.

    Args:
        folder: that is there.
        model: on the device and in the dtype to run in.
        schedule: with capacities, they decide how many tokens enter an MLP; else the token threshold does.
        weights: safetensors files in the folder that hold the model's state, in whatever dtype; none: it is
            written here.

    Raises:
        OutputError: the folder cannot be written.
    """
    programs = export_programs(model, schedule)
    schedule.save(str(folder))
    try:
        (folder / PROGRAMS).mkdir()
        for name, program in programs.programs.items():
            # In memory first: torch's own writer ends the process where the disk is full.
            torch.export.save(_bare(program), content := io.BytesIO())
            (folder / PROGRAMS / f"{name}.pt2").write_bytes(content.getvalue())
        if not weights:
            save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / WEIGHTS)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, to each writer
        raise OutputError(
            f"{folder} cannot be written ({error})", remedy="free space, or choose an empty folder"
        ) from error
    files = list(weights or (WEIGHTS,))
    tensors = {name: tensors_of(folder / name) for name in files}
    write_file(folder / PLAN, json.dumps({**_plan(model, schedule, programs), "weights": tensors}))
    write_file(folder / LOADER, Path(loader.__file__).read_bytes())
    portable = [f"{PROGRAMS}/{name}.pt2" for name in programs.programs]
    _add_sums(folder, [*files, PLAN, LOADER, *portable])
    return programs


def _add_sums(folder: Path, names: Sequence[str]) -> None:
    """Have lines of these files in the one that ``sha256sum --check`` reads."""
    path = folder / SUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    sums = {line.split("  ")[1]: line for line in lines}
    sums |= {name: f"{sha256_of(folder / name)}  {name}" for name in names}
    write_file(path, "".join(f"{line}\n" for line in sums.values()))


def tensors_of(path: Path) -> dict[str, list[Any]]:
    """Name -> first byte, byte after the last, dtype and shape, of the tensors in a safetensors file."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # length of the header, header, tensors
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    return {
        name: [*(start + place for place in entry["data_offsets"]), TYPES[entry["dtype"]], entry["shape"]]
        for name, entry in header.items()
    }


def _bare(program: ExportedProgram) -> ExportedProgram:
    """The program without the inputs that it was traced with: a block's weights would be in every file."""
    bare = copy.copy(program)
    bare._example_inputs = None
    return bare


def _classes(model: DyDiT) -> int:
    """Rows of the label table; 0 for a model that takes text."""
    shape = model.shape
    return 0 if shape.takes_text else shape.num_classes + shape.null_class


def bytes_of(folder: Path) -> int:
    """Of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weight_bytes(model: DyDiT) -> int:
    """Of a model's state, which a folder is compared with."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def compiler() -> str | None:
    """The C++ compiler that AOTInductor would call; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def compiles_for(device: str) -> bool:
    """Whether AOTInductor finds what it calls to compile for ``device``, cpu or cuda."""
    if compiler() is None:
        return False
    from torch.utils.cpp_extension import CUDA_HOME

    return device == "cpu" or CUDA_HOME is not None


def compile_programs(folder: Path, programs: Programs, progress: bool = False) -> None:
    """Compile each program with AOTInductor, for this machine, beside the portable ones.

    Raises:
        OutputError: the compiler failed.
    """
    made_for = torch.device(json.loads((folder / PLAN).read_text(encoding="utf-8"))["device"]).type
    files = {name: f"{PROGRAMS}/{name}.{made_for}.pt2" for name in programs.programs}
    for name, program in tqdm(programs.programs.items(), "compile", disable=not progress):
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=(content := io.BytesIO()))
            (folder / files[name]).write_bytes(content.getvalue())
        except (OSError, RuntimeError) as error:  # torch's errors of the compiler are RuntimeErrors
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OutputError(
                f"program {name} was not compiled ({reason})", remedy="export with --no-aot-compile"
            ) from error
    _add_sums(folder, [*files.values()])


def _plan(model: DyDiT, schedule: SubnetSchedule, programs: Programs) -> dict[str, Any]:
    weight = next(model.parameters())
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}

    def layer(linear: torch.nn.Linear) -> list[str | None]:
        return [names[id(linear.weight)], None if linear.bias is None else names[id(linear.bias)]]

    blocks = []
    for block, stages in zip(model.adapter.blocks(model.backbone), programs.blocks, strict=True):
        attention, mlp = model.adapter.attention(block), model.adapter.mlp(block)
        layers = {f"qkv{part}": layer(linear) for part, linear in enumerate(attention.qkv)}
        layers |= {"out": layer(attention.out), "fc1": layer(mlp.fc1), "fc2": layer(mlp.fc2)}
        blocks.append({"weights": stages, "layers": layers})
    return {
        "torch_version": torch.__version__,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "inputs": programs.inputs,
        "classes": _classes(model),
        "timesteps": [torch.tensor(t, dtype=torch.float32).item() for t in schedule.timesteps],
        "token_logit": logit(schedule.routing.token_threshold),
        "programs": sorted(programs.programs),
        "ends": programs.ends,
        "blocks": blocks,
        "masks": mask_slices(schedule, model),
        "rows": schedule.rows.tolist(),
        "capacities": None if schedule.capacities is None else schedule.capacities.tolist(),
    }
