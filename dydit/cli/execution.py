"""What verbs that run networks share: number formats, options that need others, the compiler."""

from __future__ import annotations

import os
import shutil
from enum import Enum

from dydit.errors import ConfigError


class DtypeChoice(str, Enum):
    """The names of ``dydit.precision.DTYPES``, here without importing torch for ``--help``."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def check_together(*options: tuple[str, object, str, bool]) -> None:
    """Refuse an option that would do nothing.

    Args:
        options: name and value of each, and name and value of what it belongs to.

    Raises:
        ConfigError: names it and the option that it belongs to.
    """
    for option, value, owner, given in options:
        if value is not None and not given:
            raise ConfigError(f"{option} without {owner}", remedy=f"add {owner}, or leave {option} out")


def check_compiler(option: str, device: str) -> None:
    """Refuse torch.compile where it finds no compiler.

    Args:
        option: that asked for it.
        device: cpu, for which inductor writes C++, or cuda, for which Triton compiles a driver in C.

    Raises:
        ConfigError: there is none.
    """
    from dydit.deployment.folder import compiler

    if device == "cpu":
        there, kind, names = compiler() is not None, "C++", "g++, or what CXX names"
    else:
        named = os.environ.get("CC")
        there = any(map(shutil.which, [named] if named else ["gcc", "clang"]))
        kind, names = "C", "gcc, clang, or what CC names"
    if not there:
        raise ConfigError(
            f"{option} without a {kind} compiler",
            expected=names,
            remedy=f"install one, or leave {option} out",
        )


def check_aot_compiler(option: str) -> None:
    """Refuse to compile programs where AOTInductor does not find what it calls.

    Raises:
        ConfigError: there is no C++ compiler, or for a GPU no CUDA toolkit.
    """
    import torch

    from dydit.deployment.folder import compiles_for

    check_compiler(option, "cpu")
    if torch.cuda.is_available() and not compiles_for("cuda"):
        raise ConfigError(
            f"{option} without the CUDA toolkit",
            expected="nvcc, or the folder that CUDA_HOME names",
            remedy=f"install it, or leave {option} out",
        )
