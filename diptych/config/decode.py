"""A plain mapping to a frozen dataclass, with errors that a person can act on.

Unknown keys are an error that names the nearest known key; wrong types and values out of range name the key,
the value and what is allowed. Knows nothing of files or of any particular setting.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from diptych.errors import ConfigError

T = TypeVar("T")

_AT_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_TYPE_NAMES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "object": "a mapping",
    "array": "a list",
}


def decode(data: Mapping[str, Any], into: type[T], *, source: str) -> T:
    """`source` says in errors where the mapping comes from."""
    _check_keys(data, into, source, prefix="")
    try:
        return msgspec.convert(data, into)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_sentence(str(error), data, into)}") from error


def unknown_key(key: str, known: Iterable[str], *, source: str) -> ConfigError:
    """`key` may be a path such as "kv_cache_config.max_token"; only its last part is compared."""
    name = key.rpartition(".")[2]
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f'did you mean "{nearest[0]}"?' if nearest else f"known here: {', '.join(names)}"
    return ConfigError(f'{source}: unknown key "{key}"; {hint}')


def field_names(cls: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(cls))


def _check_keys(data: Mapping[str, Any], into: type, source: str, *, prefix: str) -> None:
    hints = typing.get_type_hints(into)
    for key, value in data.items():
        if key not in hints:
            raise unknown_key(f"{prefix}{key}", hints, source=source)
        section = _dataclass_in(hints[key])
        if section is not None and isinstance(value, Mapping):
            _check_keys(value, section, source, prefix=f"{prefix}{key}.")


def _dataclass_in(hint: Any) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def _sentence(message: str, data: Mapping[str, Any], into: type) -> str:
    found = _AT_PATH.search(message)
    path = found["path"] if found else ""
    if found is None or not path:
        return message
    choices = _choices_at(into, path)
    expected = f"one of {', '.join(choices)}" if choices else _expected(message[: found.start()])
    return f"{path} must be {expected}, not {_value_at(data, path)!r}"


def _expected(message: str) -> str:
    """msgspec's "Expected `int | null`, got `str`" to words."""
    found = re.match(r"Expected `(?P<type>[^`]+)`(?P<bound> (?:[<>]=?|of|that|matching).*)?", message)
    if not found:
        return message
    names = [_TYPE_NAMES.get(name, name) for name in found["type"].split(" | ") if name != "null"]
    return " or ".join(names) + (found["bound"] or "")


def _value_at(data: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and part.isdigit():
            data = data[int(part)]
        else:
            return data
    return data


def _choices_at(into: type, path: str) -> list[str]:
    """The allowed texts, when the setting at `path` is one of a few."""
    hint: Any = into
    for part in path.split("."):
        section = _dataclass_in(hint)
        hint = typing.get_type_hints(section).get(part) if section is not None else None
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [
        str(choice)
        for option in options
        if typing.get_origin(option) is typing.Literal
        for choice in typing.get_args(option)
    ]
