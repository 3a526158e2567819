"""Reads what a checkpoint says of its quantization: config.json's `quantization_config`, or ModelOpt's
hf_quant_config.json.

Only the scheme is read here. Which tensors are quantized, lists of exceptions included, the tensors themselves say: one
stored as FP8 has scales beside it (fp8_weights.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diptych.errors import ModelLoadError

_METHODS = ("fp8", "modelopt", "compressed-tensors")
_MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_COMPRESSED_FORMATS = ("float-quantized", "naive-quantized")
_ACTIVATION_SCHEMES = ("static", "dynamic")
_KV_ALGORITHMS = ("FP8", None)
_STRATEGIES = ("tensor", "channel", "block")


@dataclass(frozen=True, slots=True)
class Quantization:
    weights: Literal["plain", "fp8"] = "plain"
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale; None: whole rows do
    fp8_kv: bool = False  # the KV cache is FP8, too
    when_loaded: bool = False  # the checkpoint is plain, its weights become FP8 as they are read


def read_quantization(config: Mapping[str, Any], modelopt: Mapping[str, Any]) -> Quantization:
    """`config` is config.json, `modelopt` hf_quant_config.json or empty. ModelLoadError for what cannot be loaded."""
    found = config.get("quantization_config")
    if not found:
        inner = modelopt.get("quantization")
        return _modelopt(inner, "hf_quant_config.json: quantization") if inner else Quantization()
    where = "quantization_config"
    method = _one_of(found.get("quant_method"), f"{where}.quant_method", _METHODS)
    if method == "modelopt":
        return _modelopt(found, where)
    return _compressed(found, where) if method == "compressed-tensors" else _fp8(found, where)


def _one_of(value: Any, name: str, allowed: tuple[str | None, ...]) -> Any:
    if value not in allowed:
        raise ModelLoadError(
            f"{name} is {value!r}; of quantized checkpoints, those with {_listed(allowed)} can be loaded."
        )
    return value


def _listed(allowed: tuple[str | None, ...]) -> str:
    return " or ".join("null" if value is None else value for value in allowed)


def _modelopt(found: Mapping[str, Any], where: str) -> Quantization:
    _one_of(found.get("quant_algo"), f"{where}.quant_algo", _MODELOPT_ALGORITHMS)
    kv = _one_of(found.get("kv_cache_quant_algo"), f"{where}.kv_cache_quant_algo", _KV_ALGORITHMS)
    return Quantization("fp8", fp8_kv=kv is not None or _kv_scheme(found, where))


def _fp8(found: Mapping[str, Any], where: str) -> Quantization:
    scheme = found.get("activation_scheme", "dynamic")
    _one_of(scheme, f"{where}.activation_scheme", _ACTIVATION_SCHEMES)
    _one_of(found.get("fmt", "e4m3"), f"{where}.fmt", ("e4m3",))
    return Quantization("fp8", _block(found.get("weight_block_size")), bool(found.get("kv_cache_scheme")))


def _compressed(found: Mapping[str, Any], where: str) -> Quantization:
    _one_of(found.get("format"), f"{where}.format", _COMPRESSED_FORMATS)
    blocks = {
        _group(group, f"{where}.config_groups.{name}")
        for name, group in found.get("config_groups", {}).items()
    }
    if len(blocks) > 1:
        raise ModelLoadError(f"{where}.config_groups name several kinds of scales; one kind can be loaded.")
    return Quantization("fp8", next(iter(blocks), None), _kv_scheme(found, where))


def _group(group: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    _check_float8(weights, f"{where}.weights")
    strategy = _one_of(weights.get("strategy"), f"{where}.weights.strategy", _STRATEGIES)
    if activations:
        _check_float8(activations, f"{where}.input_activations")
    return _block(weights.get("block_structure")) if strategy == "block" else None


def _block(size: Sequence[int] | None) -> tuple[int, int] | None:
    return None if size is None else (int(size[0]), int(size[1]))


def _kv_scheme(found: Mapping[str, Any], where: str) -> bool:
    scheme = found.get("kv_cache_scheme")
    if not scheme:
        return False
    _check_float8(scheme, f"{where}.kv_cache_scheme")
    return True


def _check_float8(scheme: Mapping[str, Any], where: str) -> None:
    kind = f"{scheme.get('type')}{scheme.get('num_bits')}"
    _one_of(kind, f"{where}.type with its num_bits", ("float8",))
