"""Foreign ``.pt`` files: mapped into memory, never allowed to run code."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dydit.errors import CheckpointError
from dydit.models.checkpoints.sources import TensorFacts, first_line, wrapper_prefix

# Where a training checkpoint of the DiT line keeps its state dict; averaged weights before raw ones.
CONTAINERS = ("ema", "model")

# Training checkpoints keep the command's arguments in one. It holds values and runs nothing when unpickled.
_HARMLESS: list[Any] = [argparse.Namespace]

_STATE_DICT = "a state dict of tensors, bare or under " + " or ".join(map(repr, CONTAINERS))
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # how torch's errors name code
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80"


class TorchFile:
    """The tensors of a file that ``torch.save`` wrote.

    They are mapped, not read: what a container holds beside the wanted state dict costs no memory, and
    neither does a second copy of the weights. So the file must not be overwritten in place while a model
    loaded from it is alive (renaming and deleting are fine).

    Args:
        path: the file.

    Raises:
        CheckpointError: truncated, no file of torch's, needs code to be run, or holds no state dict.
    """

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        state = _state_dict(path, _unpickle(path))
        prefix = wrapper_prefix(state)
        state = {name.removeprefix(prefix) if prefix else name: value for name, value in state.items()}
        self._tensors = {name: _plain_tensor(path, name, value) for name, value in state.items()}
        self.facts = {
            name: TensorFacts(tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor itself, backed by the file."""
        return self._tensors[name]


def _unpickle(path: Path) -> Any:
    mapped = _is_zip(path)
    try:
        with safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the unpickler's guesses at what is wrong; the error says it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        if foreign := _foreign_globals(path, error):
            raise CheckpointError(
                f"{path} needs {', '.join(foreign[:3])} to be run in order to be read",
                expected="a file of tensors only",
                remedy="if you trust its source, save its state dict alone with torch.save",
            ) from error
        raise CheckpointError(
            f"{path} is damaged ({_reason(error)})",
            expected="a file that torch.save wrote",
            remedy="copy or download it again",
        ) from error


def _is_zip(path: Path) -> bool:
    """Whether the file is of torch's current, mappable format rather than of the one before 1.6.

    Raises:
        CheckpointError: it is of neither, or truncated.
    """
    with path.open("rb") as file:
        magic = file.read(len(_ZIP_MAGIC))
    if magic == _ZIP_MAGIC:
        if not _has_directory(path):
            raise CheckpointError(
                f"{path} is truncated at {path.stat().st_size} bytes", remedy="copy or download it again"
            )
        return True
    if not magic:
        raise CheckpointError(f"{path} is empty", remedy="copy or download it again")
    if not magic.startswith(_LEGACY_MAGIC):
        raise CheckpointError(
            f"{path} begins with {magic!r}", expected="a .pt file of torch.save or a .safetensors file"
        )
    return False


def _has_directory(path: Path) -> bool:
    """Whether a zip file's directory, which is at its end, is there."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # there, but damaged: torch will say how
        return True


def _foreign_globals(path: Path, error: Exception) -> list[str]:
    """Names of the code that a file asks for beyond what is allowed; empty where that cannot be told."""
    try:
        with safe_globals(_HARMLESS):
            if names := sorted(get_unsafe_globals_in_checkpoint(path)):
                return names
    except Exception:  # a damaged pickle can raise anything, and torch does not look into the old format
        pass
    return _GLOBAL.findall(str(error))


def _reason(error: Exception) -> str:
    """What torch says is wrong, without its advice on how to run the file's code."""
    said = [part for part in str(error).split("\n\n") if part.strip() and "torch.load" not in part]
    return first_line(said[0] if said else type(error).__name__)


def _state_dict(path: Path, content: Any) -> Mapping[str, Any]:
    """The state dict in a file's content.

    Raises:
        CheckpointError: there is none.
    """
    if isinstance(content, Mapping):
        for container in CONTAINERS:
            if isinstance(content.get(container), Mapping):
                return content[container]
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        seen = "a mapping of " + (", ".join(repr(key) for key in list(content)[:5]) or "nothing")
    else:
        seen = f"a {type(content).__name__}"
    raise CheckpointError(f"{path} holds {seen[:200]}", expected=_STATE_DICT)


def _plain_tensor(path: Path, name: Any, value: Any) -> Tensor:
    """A dense tensor that owns as many bytes as it has elements.

    Raises:
        CheckpointError: the entry is no such tensor.
    """
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise CheckpointError(
            f"{path} holds {str(name)[:100]!r}: {type(value).__name__}", expected=_STATE_DICT
        )
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: tensor {name} is sparse, quantized or empty", expected="a dense one")
    # A few bytes could otherwise pose as a tensor of any size.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: tensor {name} of shape {tuple(tensor.shape)} has fewer bytes than that"
        )
    return tensor
