"""A run's configuration from a YAML file and dotted overrides, and back to YAML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dydit.config.problems import config_error, known_keys, unknown_key
from dydit.config.run import RunConfig
from dydit.config.text import dump_yaml, one_line, parse_yaml
from dydit.errors import ConfigError

# The folder that holds the package: in a clone, the one with configs/ and checkpoints/.
_ROOT = Path(__file__).resolve().parents[2]


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, after ``key.key=value`` overrides (values are YAML).

    ``backbone`` and ``data.path`` are replaced by absolute paths where only the folder that holds
    the package has them (see :func:`find_path`).

    Args:
        path: the YAML file, found as :func:`find_path` finds it.
        overrides: such as ``["train.lr=2e-5", "train.betas=[0.9, 0.95]"]``; the last one counts.

    Raises:
        ConfigError: for a file that is missing or no YAML mapping, an unknown key, a missing one, a wrong
            type or a value out of range, each with its dotted key.
    """
    settings = _read(Path(find_path(os.fspath(path))))
    for override in overrides:
        _apply(settings, override)
    _find_inputs(settings)
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as problem:
        raise config_error(problem, RunConfig) from None


def dump_config(config: RunConfig) -> str:
    """YAML text, all defaults included, that :func:`load_config` reads back as an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def find_path(path: str) -> str:
    """``path`` if the working directory has it, else its place beside the package, else ``path`` again.

    So that ``checkpoints/…`` of a clone is found from any folder, and a Hub id stays what it is.
    """
    if os.path.exists(path) or not (_ROOT / path).exists():
        return path
    return str(_ROOT / path)


def _read(path: Path) -> dict[Any, Any]:
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(
            f"cannot read configuration {path}: {problem.strerror}", remedy="give the path of a YAML file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration {path} is not UTF-8 text", expected="a YAML file") from None
    except yaml.YAMLError as problem:
        raise ConfigError(
            f"configuration {path} is not YAML: {one_line(problem)}", remedy="correct the file there"
        ) from None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"configuration {path} holds {_kind(settings)}",
            expected="a mapping of settings",
            remedy="write `key: value` lines",
        )
    return settings


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _apply(settings: dict[Any, Any], override: str) -> None:
    """Sets one dotted key in place; sections on the way are made where there are none."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}", expected="key=value", remedy="write it as train.lr=2e-5")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as problem:
        raise ConfigError(
            f"value of override {override!r} is not YAML: {one_line(problem)}", remedy="quote the value"
        ) from None
    if ".".join(parts) not in known_keys(RunConfig):
        raise unknown_key(".".join(parts), RunConfig)
    section = settings
    for part in parts[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    section[parts[-1]] = value


def _find_inputs(settings: dict[Any, Any]) -> None:
    """Resolves the settings that name something to read; anything of a wrong type is left to validation."""
    data = settings.get("data")
    for section, key in ((settings, "backbone"), (data, "path")):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = find_path(section[key])
