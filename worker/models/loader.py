"""From a path to a ModelConfig and to canonical weights, for Hugging Face directories and GGUF files.

Weights are read, checked, joined and converted to the config's dtype part by part in a few threads. Knows
nothing of hubs (diptych/model_source.py) or of what runs the model (build.py).
"""

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diptych.errors import ModelLoadError
from diptych.worker.models.config import ModelConfig
from diptych.worker.models.gguf_file import GgufFile
from diptych.worker.models.safetensors_dir import SafetensorsDir, read_json, read_optional_json
from diptych.worker.models.weights import Part, WeightSpec, dummy_weights, torch_dtype, weight_specs
from diptych.worker.parallel import ONE_RANK, ParallelDims

__all__ = ["TensorSource", "dummy_weights", "is_gguf", "load_config", "load_weights"]

_ROPE_FREQS = "rope_freqs.weight"


class TensorSource(Protocol):
    """A checkpoint: tensors by its own names. Errors name the file and the tensor."""

    @property
    def path(self) -> Path: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, axis: int = 0, cut: range | None = None) -> Tensor:
        """All of it, or the indices `cut` along `axis`."""
        ...


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def load_config(path: Path) -> ModelConfig:
    if not path.exists():
        raise ModelLoadError(f"{path} does not exist.")
    if is_gguf(path):
        return _gguf_config(GgufFile.open(path))
    if not path.is_dir():
        raise ModelLoadError(f"{path} is neither a .gguf file nor the directory of a Hugging Face model.")
    return ModelConfig.from_hf(
        read_json(path / "config.json"), read_optional_json(path / "generation_config.json")
    )


def load_weights(
    path: Path,
    config: ModelConfig,
    progress: Callable[[float], None],
    device: torch.device | None = None,
    *,
    dims: ParallelDims = ONE_RANK,
) -> dict[str, Tensor]:
    """Canonical weights (see weights.py) in the config's dtype, each put on `device` as it is read (None: the CPU).

    `config` is that of the whole model, of which only what the rank holds is read.
    `progress` gets fractions, in this thread.
    """
    source: TensorSource = GgufFile.open(path) if is_gguf(path) else SafetensorsDir.open(path)
    specs = weight_specs(config)
    total, done = sum(_size(spec) for spec in specs), 0
    dtype = torch_dtype(config)
    weights = {}
    with ThreadPoolExecutor(_num_threads(), thread_name_prefix="load") as pool:
        # The largest first, so that no thread is left alone with it at the end.
        ordered = sorted(specs, key=_size, reverse=True)
        pending = {pool.submit(_load, source, spec, dtype, device, dims): spec for spec in ordered}
        try:
            for future in as_completed(pending):
                spec = pending[future]
                weights[spec.name] = future.result()
                done += _size(spec)
                progress(done / total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {spec.name: weights[spec.name] for spec in specs}


def _gguf_config(file: GgufFile) -> ModelConfig:
    config = ModelConfig.from_gguf(file.metadata, file.shapes())
    if _ROPE_FREQS not in file.tensors:
        return config
    divisors = tuple(file.read(_ROPE_FREQS).tolist())
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, frequency_divisors=divisors))


def _load(
    source: TensorSource,
    spec: WeightSpec,
    dtype: torch.dtype,
    device: torch.device | None,
    dims: ParallelDims,
) -> Tensor:
    shape = spec.local_shape(dims)
    if spec.added_once and dims.tp_rank:
        return torch.zeros(shape, dtype=dtype, device=device)
    weight = torch.empty(shape, dtype=dtype, device=device)
    row = 0
    for part in spec.parts:
        tensor = _read(source, part, part.cut(dims))
        weight[row : row + len(tensor)] = tensor
        row += len(tensor)
    return weight


def _read(source: TensorSource, part: Part, cut: range) -> Tensor:
    gguf = isinstance(source, GgufFile)
    name = part.gguf_name if gguf else part.hf_name
    shape = source.shape(name)
    if shape != part.shape:
        raise ModelLoadError(
            f"Tensor {name} of {source.path} has shape {list(shape)}; the model's config asks for "
            f"{list(part.shape)}."
        )
    tensor = source.read(name, part.axis, cut)
    if gguf and part.interleaved_heads is not None:
        return _half_split(tensor, part.interleaved_heads * len(tensor) // part.shape[0])
    return tensor


def _half_split(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo the row order of GGUF's llama files, where the two elements that turn together are neighbours."""
    rows, *tail = tensor.shape
    return tensor.view(num_heads, rows // num_heads // 2, 2, *tail).transpose(1, 2).reshape(rows, *tail)


def _size(spec: WeightSpec) -> int:
    return torch.Size(spec.shape).numel()


def _num_threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))
