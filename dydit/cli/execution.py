"""What verbs that run networks share: number formats, options that need others, the compiler."""

from __future__ import annotations

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
