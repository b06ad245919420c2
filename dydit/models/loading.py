"""``load_backbone``: pretrained static models from where users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin

from dydit.errors import CheckpointError
from dydit.models.dit import DiT

T = TypeVar("T", bound=ModelMixin)


def load_backbone(path: str | Path, **options: Any) -> DiT:
    """Load a static backbone.

    Args:
        path: a folder written by ``save_pretrained``, or a Hub id.
        options: passed on to ``from_pretrained`` (``revision``, ``torch_dtype``, …).

    Raises:
        CheckpointError: missing, truncated, or of another architecture.
    """
    return load_folder(DiT, path, **options)


def load_folder(cls: type[T], path: str | Path, **options: Any) -> T:
    """``cls.from_pretrained`` with errors that say what is wrong, and weights that must fit exactly.

    Raises:
        CheckpointError: missing, truncated, of another class, or with tensors left over or absent.
    """
    if not Path(path).is_dir() and _looks_local(path):
        raise CheckpointError(
            f"no model folder at {path}",
            expected="a folder with config.json and safetensors",
            remedy="check the path, or give a Hub id",
        )
    options.setdefault("use_safetensors", True)  # never fall back to unpickling
    try:
        found = cls.load_config(str(path)).get("_class_name")
        if found != cls.__name__:
            raise CheckpointError(f"{path} holds a {found}", expected=f"a {cls.__name__}")
        model, info = cls.from_pretrained(str(path), output_loading_info=True, **options)
    except CheckpointError:
        raise
    except Exception as error:  # diffusers, safetensors and the Hub client each raise their own
        raise CheckpointError(
            f"{path} cannot be loaded ({_first_line(error)})",
            expected=f"a complete {cls.__name__} folder",
            remedy="copy or download it again",
        ) from error
    _check_complete(path, info)
    return model.eval()


def _check_complete(path: str | Path, info: dict[str, Any]) -> None:
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "holds unknown")):
        if names := sorted(info.get(kind) or ()):
            raise CheckpointError(f"{path} {verb} tensor {names[0]} and {len(names) - 1} more")
    if info.get("error_msgs"):
        raise CheckpointError(f"{path}: {_first_line(info['error_msgs'][0])}")


def _looks_local(path: str | Path) -> bool:
    """Hub ids are ``owner/name``: neither absolute, nor dotted, nor deeper, nor with an existing parent."""
    text = str(path)
    return text.count("/") != 1 or text.startswith(("/", ".", "~")) or Path(text).parent.is_dir()


def _first_line(error: object) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
