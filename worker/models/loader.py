"""From a path to a ModelConfig and to canonical weights, for Hugging Face directories and GGUF files.

Weights are read, checked, joined and converted to the config's dtype part by part in a few threads. Knows
nothing of hubs (diptych/model_source.py) or of what runs the model (build.py).
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diptych.errors import ModelLoadError
from diptych.worker.models.config import ModelConfig
from diptych.worker.models.fp8_weights import (
    FP8,
    StoredWeight,
    may_stay,
    quantize_rows,
    scale_name,
    scale_names,
)
from diptych.worker.models.gguf_file import GgufFile
from diptych.worker.models.kv_scales import kv_factors
from diptych.worker.models.safetensors_dir import SafetensorsDir, read_json, read_optional_json
from diptych.worker.models.weights import Part, WeightSpec, dummy_weights, torch_dtype, weight_specs
from diptych.worker.parallel import ONE_RANK, ParallelDims

__all__ = ["TensorSource", "dummy_weights", "is_gguf", "load_config", "load_weights"]

_ROPE_FREQS = "rope_freqs.weight"


class TensorSource(Protocol):
    """A checkpoint: tensors by its own names. Errors name the file and the tensor."""

    @property
    def path(self) -> Path: ...

    def has(self, name: str) -> bool: ...

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
        read_json(path / "config.json"),
        read_optional_json(path / "generation_config.json"),
        read_optional_json(path / "hf_quant_config.json"),
    )


def load_weights(
    path: Path,
    config: ModelConfig,
    progress: Callable[[float], None],
    device: torch.device | None = None,
    *,
    dims: ParallelDims = ONE_RANK,
    keep_fp8: bool = False,
) -> dict[str, Tensor]:
    """Canonical weights (see weights.py) in the config's dtype, each put on `device` as it is read (None: the CPU).

    `config` is that of the whole model, of which only what the rank holds is kept. `progress` gets fractions, in this
    thread. `keep_fp8`: what is quantized stays as fp8_weights.py says, where the kernels can take it.
    """
    source: TensorSource = GgufFile.open(path) if is_gguf(path) else SafetensorsDir.open(path)
    specs = weight_specs(config)
    total, done = sum(_size(spec) for spec in specs), 0
    reader = _Reader(
        source,
        config,
        kv_factors(source, config) if config.quantization.fp8_kv else {},
        device,
        dims,
        keep_fp8=keep_fp8,
    )
    weights: dict[str, Tensor] = {}
    with ThreadPoolExecutor(_num_threads(), thread_name_prefix="load") as pool:
        # The largest first, so that no thread is left alone with it at the end.
        ordered = sorted(specs, key=_size, reverse=True)
        pending = {pool.submit(reader.load, spec): spec for spec in ordered}
        try:
            for future in as_completed(pending):
                spec = pending[future]
                weights |= future.result()
                done += _size(spec)
                progress(done / total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return weights


def _gguf_config(file: GgufFile) -> ModelConfig:
    config = ModelConfig.from_gguf(file.metadata, file.shapes())
    if _ROPE_FREQS not in file.tensors:
        return config
    divisors = tuple(file.read(_ROPE_FREQS).tolist())
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, frequency_divisors=divisors))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes canonical weights of a checkpoint's tensors. Called by several threads."""

    source: TensorSource
    config: ModelConfig
    factors: Mapping[str, float]  # for tensors by their names
    device: torch.device | None
    dims: ParallelDims
    keep_fp8: bool

    def load(self, spec: WeightSpec) -> dict[str, Tensor]:
        """This rank's part of the weight, and its scales when it stays in FP8."""
        shape = spec.local_shape(self.dims)
        if spec.added_once and self.dims.tp_rank:
            return {spec.name: torch.zeros(shape, dtype=torch_dtype(self.config), device=self.device)}
        parts = [self._read(part) for part in spec.parts]
        stays = self.keep_fp8 and may_stay(spec.name, shape)
        if stays and all(part.has_row_scales for part in parts):
            scales = [part.row_scales() for part in parts]
            return {
                spec.name: self._join(shape, [part.values for part in parts], FP8),
                scale_name(spec.name): torch.cat(scales).to(self.device),
            }
        weight = self._join(shape, [part.plain() for part in parts], torch_dtype(self.config))
        if stays and self.config.quantization.when_loaded:
            values, scale = quantize_rows(weight)
            return {spec.name: values, scale_name(spec.name): scale}
        return {spec.name: weight}

    def _join(self, shape: tuple[int, ...], parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        weight = torch.empty(shape, dtype=dtype, device=self.device)
        row = 0
        for part in parts:
            weight[row : row + len(part)] = part
            row += len(part)
        return weight

    def _read(self, part: Part) -> StoredWeight:
        source = self.source
        gguf = isinstance(source, GgufFile)
        name = part.gguf_name if gguf else part.hf_name
        shape = source.shape(name)
        if shape != part.shape:
            raise ModelLoadError(
                f"Tensor {name} of {source.path} has shape {list(shape)}; the model's config asks for "
                f"{list(part.shape)}."
            )
        cut = part.cut(self.dims)
        scale = next((source.read(each) for each in scale_names(name) if source.has(each)), None)
        if scale is None:
            tensor = source.read(name, part.axis, cut)
            if gguf and part.interleaved_heads is not None:
                tensor = _half_split(tensor, part.interleaved_heads * len(tensor) // part.shape[0])
            stored = StoredWeight.of(name, tensor, None, None)
        else:
            whole = StoredWeight.of(name, source.read(name), scale, self.config.quantization.block)
            stored = whole.part(part.axis, cut)
        return stored.times(self.factors[name]) if name in self.factors else stored


def _half_split(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo the row order of GGUF's llama files, where the two elements that turn together are neighbours."""
    rows, *tail = tensor.shape
    return tensor.view(num_heads, rows // num_heads // 2, 2, *tail).transpose(1, 2).reshape(rows, *tail)


def _size(spec: WeightSpec) -> int:
    return torch.Size(spec.shape).numel()


def _num_threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))
