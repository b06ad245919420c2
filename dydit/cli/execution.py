"""What verbs that run networks share: number formats, and the compiler that some of them call."""

from __future__ import annotations

from enum import Enum

from dydit.errors import ConfigError


class DtypeChoice(str, Enum):
    """The names of ``dydit.precision.DTYPES``, here without importing torch for ``--help``."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def check_compiler(option: str) -> None:
    """Refuse to compile for the CPU where nothing can.

    Args:
        option: that asked for it.

    Raises:
        ConfigError: there is no C++ compiler.
    """
    from dydit.deployment.folder import compiler

    if compiler() is None:
        raise ConfigError(
            f"{option} without a C++ compiler",
            expected="g++, or what CXX names",
            remedy=f"install one, or leave {option} out",
        )
