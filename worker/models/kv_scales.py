"""Scales of an FP8 KV cache: taken from a checkpoint, and put into the weights around the cache.

A calibrated checkpoint says by how much K and V of a layer are to be divided before they are stored. The projections
that make K and V are divided by it once, and those that read them (through the query, and after attention) multiplied:
the cache then holds scaled numbers, the model computes what it did, and attention knows of no scale. Rounded up to a
power of two a scale changes the exponents of weights only, so nothing is lost; a larger one costs no precision, since
FP8 is floating point.
"""

import math
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from diptych.worker.models.config import ModelConfig

# Below ``model.layers.{i}.self_attn.``, by the tools that wrote them.
_K_NAMES = ("k_proj.k_scale", "k_scale", "k_proj.output_scale", "kv_scale")
_V_NAMES = ("v_proj.v_scale", "v_scale", "v_proj.output_scale", "kv_scale")


class Scales(Protocol):
    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor: ...


def kv_factors(source: Scales, config: ModelConfig) -> dict[str, float]:
    """What tensors of the checkpoint are to be multiplied with, by their names; powers of two other than 1."""
    factors: dict[str, float] = {}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        key, value = (_power_of_two(source, prefix, names) for names in (_K_NAMES, _V_NAMES))
        factors |= {prefix + name: factor for name, factor in _around(config, key, value)}
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def _around(config: ModelConfig, key: float, value: float) -> Iterator[tuple[str, float]]:
    if config.qk_norm:  # undoes what is before it
        yield "q_norm.weight", key
        yield "k_norm.weight", 1 / key
    else:
        for kind in ("weight", "bias"):
            yield f"q_proj.{kind}", key
            yield f"k_proj.{kind}", 1 / key
    yield "v_proj.weight", 1 / value
    yield "v_proj.bias", 1 / value
    yield "o_proj.weight", value


def _power_of_two(source: Scales, prefix: str, names: tuple[str, ...]) -> float:
    name = next((prefix + name for name in names if source.has(prefix + name)), None)
    scale = 1.0 if name is None else float(source.read(name).float().max())
    return 2.0 ** math.ceil(math.log2(scale)) if scale > 0 and math.isfinite(scale) else 1.0
