"""YAML as settings need it: ``2e-5`` is a number, ``no`` a word, and no key stands twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

# YAML 1.1, which PyYAML speaks, wants a dot and a sign in 2.0e-5; everybody writes 2e-5.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)
    |[-+]?(?:[0-9][0-9_]*)\.[0-9_]*
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_FLOAT_STARTS = "-+0123456789."
# Words that YAML 1.1 reads as true or false: `mixed_precision: no` is meant as the word.
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
# Without YAML 1.1's octal 010 and its base-sixty 12:30.
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$")

_TAG_INT = "tag:yaml.org,2002:int"
_TAG_FLOAT = "tag:yaml.org,2002:float"
_TAG_BOOL = "tag:yaml.org,2002:bool"
_REPLACED_TAGS = (_TAG_INT, _TAG_FLOAT, _TAG_BOOL, "tag:yaml.org,2002:timestamp")


class SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 numbers and booleans and no dates, refusing a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class SettingsDumper(yaml.SafeDumper):
    """PyYAML's safe dumper that quotes strings which either dialect would read as something else."""


SettingsLoader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(_TAG_INT, _INT, list("-+0123456789"))
SettingsLoader.add_implicit_resolver(_TAG_FLOAT, _FLOAT, list(_FLOAT_STARTS))
SettingsLoader.add_implicit_resolver(_TAG_BOOL, _BOOL, list("tTfF"))
SettingsDumper.add_implicit_resolver(_TAG_FLOAT, _FLOAT, list(_FLOAT_STARTS))


def parse_yaml(text: str) -> Any:
    """The value of one YAML document.

    Raises:
        yaml.YAMLError: if the text is not YAML; so is a mapping with the same key twice.
    """
    return yaml.load(text, SettingsLoader)


def dump_yaml(value: Any) -> str:
    """YAML text that :func:`parse_yaml` reads back as ``value``, keys in their order."""
    # Escaped, not allow_unicode: with it PyYAML writes some line separators that it reads back as spaces.
    return yaml.dump(value, Dumper=SettingsDumper, sort_keys=False, width=110)


def one_line(problem: yaml.YAMLError) -> str:
    """What PyYAML found and where, without its excerpt of the file."""
    if isinstance(problem, yaml.MarkedYAMLError):
        mark = problem.problem_mark or problem.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"{problem.problem or problem.context}{where}"
    return " ".join(str(problem).split())
