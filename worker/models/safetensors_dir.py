"""Reads a Hugging Face directory: config.json, and weights in one safetensors file or in shards with an
index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diptych.errors import ModelLoadError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{path.parent} has no {path.name}: it is not the directory of a Hugging Face model."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__}; a JSON object is needed.")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


@dataclass(frozen=True, slots=True)
class SafetensorsDir:
    path: Path
    files: Mapping[str, Any]  # tensor name to the open file that holds it

    @classmethod
    def open(cls, path: Path) -> "SafetensorsDir":
        index = path / INDEX_NAME
        if index.exists():
            return cls(path, _open_shards(path, index))
        if not (path / SINGLE_NAME).exists():
            found = sorted(entry.name for entry in path.glob("*.bin"))
            hint = f"; {found[0]} is a pickle, which is never loaded" if found else ""
            raise ModelLoadError(f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}.")
        file = _open_file(path / SINGLE_NAME)
        return cls(path, dict.fromkeys(file.keys(), file))

    def has(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def read(self, name: str, axis: int = 0, cut: range | None = None) -> Tensor:
        """All of it, or the indices `cut` along `axis`, 0 or 1; no more than that is read from the file."""
        file, tensor = self._file(name), None
        if cut is None:
            tensor = file.get_tensor(name)
        elif axis == 0:
            tensor = file.get_slice(name)[cut.start : cut.stop]
        else:
            tensor = file.get_slice(name)[:, cut.start : cut.stop]
        assert isinstance(tensor, Tensor)
        return tensor

    def _file(self, name: str) -> Any:
        if name not in self.files:
            raise ModelLoadError(f"The checkpoint in {self.path} has no tensor {name}.")
        return self.files[name]


def _open_shards(path: Path, index: Path) -> dict[str, Any]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelLoadError(f"{index} has no 'weight_map'.")
    shards = {name: _open_file(path / name, listed_in=index) for name in sorted(set(weight_map.values()))}
    held = {name: set(shard.keys()) for name, shard in shards.items()}
    for tensor, shard in weight_map.items():
        if tensor not in held[shard]:
            raise ModelLoadError(f"{path / shard} has no tensor {tensor}, which {index.name} says it holds.")
    return {tensor: shards[shard] for tensor, shard in weight_map.items()}


def _open_file(path: Path, *, listed_in: Path | None = None) -> Any:
    if not path.exists():
        listed = f", which {listed_in.name} lists" if listed_in else ""
        raise ModelLoadError(f"{path} is missing{listed}.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} cannot be read (truncated or damaged): {error}.") from error
