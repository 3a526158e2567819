"""`api_keys`: who may use the public port. A list in the YAML, the name of a file, or an environment variable.

In a file each line is a key, with its weight and its name behind it if they are not the usual ones.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.config.decode import decode
from diptych.config.sections import PositiveFloat
from diptych.errors import ConfigError

VARIABLE = "DIPTYCH_API_KEYS"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySetting:
    """`weight`: how much of the waiting line is this key's, against the others'."""

    key: str = field(repr=False)
    name: str = ""
    weight: PositiveFloat = 1.0


def read_api_keys(given: Any, *, source: str) -> tuple[KeySetting, ...]:
    """What the configuration says, else what the environment does; empty: everybody may ask."""
    if given is None:
        given = [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
        source = VARIABLE
    if isinstance(given, str):
        given, source = _from_file(given, source), given
    if not isinstance(given, Sequence):
        raise ConfigError(
            f"{source}: api_keys must be a list of keys or the name of a file", param="api_keys"
        )
    settings = tuple(_setting(entry, number, source) for number, entry in enumerate(given))
    if len({setting.key for setting in settings}) < len(settings):
        raise ConfigError(f"{source}: api_keys has a key more than once", param="api_keys")
    return settings


def _setting(entry: Any, number: int, source: str) -> KeySetting:
    if isinstance(entry, KeySetting):
        return entry
    if isinstance(entry, str):
        entry = {"key": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("key"), str) or not entry["key"].strip():
        message = f"{source}: api_keys[{number}] must be a key, or {{key: KEY, name: NAME, weight: NUMBER}}"
        raise ConfigError(message, param="api_keys")
    return decode({"name": f"key-{number}", **entry}, KeySetting, source=f"{source}: api_keys[{number}]")


def _from_file(name: str, source: str) -> list[dict[str, Any]]:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{source}: api_keys: cannot read {name!r}: {error.strerror}") from error
    entries = []
    for line in lines:
        key, *rest = line.split(maxsplit=2) or [""]
        if not key or key.startswith("#"):
            continue
        entry: dict[str, Any] = {"key": key}
        if rest:
            try:
                entry["weight"] = float(rest[0])
            except ValueError:
                message = f"{name}: api_keys: the weight of a key must be a number, not {rest[0]!r}"
                raise ConfigError(message, param="api_keys") from None
        if len(rest) > 1:
            entry["name"] = rest[1].strip()
        entries.append(entry)
    return entries
