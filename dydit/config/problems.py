"""Turns a failed validation into one line: the dotted key, what was seen, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dydit.errors import ConfigError

# A key this close to a sibling is taken for a misspelling of it, not for a setting of another section.
_SIBLING_CUTOFF = 0.6
_SHOWN_VALUE_LENGTH = 60

# What pydantic calls by the names of Python's types, in the words of a YAML file.
_EXPECTED_TYPES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "string_too_short": "text",
    "tuple_type": "a list",
    "missing": "a longer list",
    "too_short": "a longer list",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
}


def known_keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every dotted key of a settings model with its field, sections included, in order of definition."""
    return dict(_walk(model, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = section_of(field)
        if section is not None:
            yield from _walk(section, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The settings model behind a field (``X`` or ``X | None``), or None for a plain value."""
    candidates = getattr(field.annotation, "__args__", ()) or (field.annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def nearest_key(key: str, known: Sequence[str]) -> str:
    """The known dotted key most like ``key``: a sibling first, then the same last name elsewhere."""
    section, leaf = _section(key), _leaf(key)
    siblings = {_leaf(other): other for other in known if _section(other) == section}
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=_SIBLING_CUTOFF)
    if close:
        return siblings[close[0]]
    namesakes = [other for other in known if _leaf(other) == leaf]
    return difflib.get_close_matches(key, namesakes or known, n=1, cutoff=0.0)[0]


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def unknown_key(key: str, model: type[BaseModel]) -> ConfigError:
    """The error for a key that no setting has, with the nearest known one."""
    nearest = nearest_key(key, list(known_keys(model)))
    return ConfigError(f"unknown key {key}", remedy=f"did you mean {nearest}?")


def config_error(problem: ValidationError, model: type[BaseModel]) -> ConfigError:
    """One :class:`ConfigError` for a failed validation of ``model``.

    The first problem is told in full and the others are counted. Unknown keys come first: a
    misspelt key is often why another one is missing.
    """
    details = problem.errors(include_url=False)
    known = known_keys(model)
    unknown = [_dotted(d["loc"]) for d in details if d["type"] in ("extra_forbidden", "invalid_key")]
    keys = list(dict.fromkeys(unknown or [_key_of(d["loc"], known) for d in details]))
    first = unknown_key(keys[0], model) if unknown else _first_error(keys[0], details, known)
    if len(keys) == 1:
        return first
    return ConfigError(f"{first} (also wrong: {', '.join(keys[1:])})")


def _first_error(key: str, details: Sequence[ErrorDetails], known: Mapping[str, FieldInfo]) -> ConfigError:
    about = [d for d in details if _key_of(d["loc"], known) == key]
    detail = about[0]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return ConfigError(f"{key}.{cause}" if key else str(cause))  # it begins with the field's name
    meaning = _meaning(known.get(key))
    if detail["type"] == "missing":
        return ConfigError(f"{key} is missing", remedy=f"set {key}{meaning}")
    # A list that is too short for lack of good values is told by its values.
    telling = [d for d in about if d["type"] != "too_short"] or about
    expected = " or ".join(dict.fromkeys(_expectation(d) for d in telling))
    seen = f"{key or 'the configuration'} is {_shown(detail['input'])}"
    return ConfigError(seen, expected=expected, remedy=f"correct {key}{meaning}" if key else "")


def _dotted(loc: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in loc if part != "[key]")


def _key_of(loc: Sequence[int | str], known: Mapping[str, FieldInfo]) -> str:
    """The longest known dotted key that ``loc`` starts with; pydantic adds union members and indices."""
    for end in range(len(loc), 0, -1):
        key = _dotted(loc[:end])
        if key in known:
            return key
    return ""


def _expectation(detail: ErrorDetails) -> str:
    return _EXPECTED_TYPES.get(detail["type"]) or detail["msg"].removeprefix("Input should be ")


def _meaning(field: FieldInfo | None) -> str:
    return f" ({field.description})" if field is not None and field.description else ""


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= _SHOWN_VALUE_LENGTH else text[: _SHOWN_VALUE_LENGTH - 1] + "…"
