"""Where tensors come from: a mapping of names to facts, and one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dydit.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls the files in a model's folder

# safetensors' names of the types that weights can have, in torch's words.
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

# What wrappers put before every name of a state dict: DistributedDataParallel, torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

# What safetensors raises over a file that is damaged, or gone.
_READ_ERRORS = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class TensorFacts:
    """What is known of a stored tensor before it is read: its shape and its dtype by torch's name."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """Stored tensors."""

    @property
    def label(self) -> str:
        """The file or folder, for messages."""

    @property
    def facts(self) -> Mapping[str, TensorFacts]:
        """Name -> shape and dtype of every tensor."""

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""


class SafetensorsFiles:
    """The tensors of one or more safetensors files.

    Args:
        label: the file or folder, for messages.
        paths: the files.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file, or two hold the same tensor.
    """

    def __init__(self, label: str, paths: Iterable[Path]) -> None:
        self.label = label
        stored: dict[str, tuple[Path, TensorFacts]] = {}
        for path in paths:
            for name, facts in _safetensors_facts(path).items():
                if name in stored:
                    raise CheckpointError(
                        f"{label} holds tensor {name} twice, the second time in {path.name}"
                    )
                stored[name] = path, facts
        prefix = wrapper_prefix(stored)
        self._paths = {name.removeprefix(prefix): (path, name) for name, (path, _) in stored.items()}
        self.facts = {name.removeprefix(prefix): facts for name, (_, facts) in stored.items()}

    def read(self, name: str) -> Tensor:
        """A copy of the tensor; the file is mapped only meanwhile, so that no page of it counts twice."""
        try:
            path, stored_name = self._paths[name]
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored_name).clone()
        except _READ_ERRORS as error:
            raise CheckpointError(
                f"{self.label}: tensor {name} cannot be read ({first_line(error)})"
            ) from error


def wrapper_prefix(names: Collection[Any]) -> str:
    """What wrappers put before all names of a state dict, one within another; empty for none."""
    prefix = ""
    while names:
        longer = [prefix + part for part in _WRAPPER_PREFIXES]
        found = [p for p in longer if all(isinstance(name, str) and name.startswith(p) for name in names)]
        if not found:
            break
        (prefix,) = found
    return prefix


def _safetensors_facts(path: Path) -> dict[str, TensorFacts]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: TensorFacts(tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype()))
                for name, s in slices.items()
            }
    except _READ_ERRORS as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({first_line(error)})",
            remedy="copy or download it again",
        ) from error


def index_files(index: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names.

    Raises:
        CheckpointError: the index is broken, or names what does not lie beside it.
    """
    weight_map = read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names:
        raise CheckpointError(f"{index} has no weight_map", remedy="copy or download it again")
    for name in names:
        # Only names: a path would lead out of the folder.
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name!r:.100}", expected="a file beside it")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: it is missing, no JSON, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({first_line(error)})", remedy="copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}", expected="a mapping")
    return value


def first_line(error: object) -> str:
    """The first line of another library's message, short enough for one line of ours."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
