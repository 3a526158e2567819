"""Linear layers, and the seam where a way of storing weights (a quantization, a packing) plugs in.

A `QuantMethod` takes a dense weight once, at load time, and gives back what multiplies with it. Layers say
which axis of their weight a tensor-parallel rank would keep (`split`); how weights are stored is no business
of theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# "outputs": ranks keep rows of the weight, and outputs are a part of the whole (column parallel). "inputs":
# ranks keep
# columns, and outputs are partial sums (row parallel).
Split = Literal["outputs", "inputs"]


class PackedLinear(Protocol):
    """`x @ weight.T + bias` in x's dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


class QuantMethod(Protocol):
    @property
    def name(self) -> str: ...

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Take over a dense `[outputs, inputs]` weight."""
        ...


@dataclass(frozen=True, slots=True)
class Linear:
    packed: PackedLinear
    split: Split
    gather: Callable[[Tensor], Tensor] | None = (
        None  # from what this rank computes to what all did; None: nothing
    )

    def __call__(self, x: Tensor) -> Tensor:
        product = self.packed(x)
        return product if self.gather is None else self.gather(product)


@dataclass(frozen=True, slots=True)
class DenseWeight:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Dense:
    """The weight as it is."""

    name: str = "torch"

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return DenseWeight(weight, bias)


@dataclass(frozen=True, slots=True)
class OneDnnWeight:
    weight: Tensor  # in oneDNN's own order
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


@dataclass(frozen=True, slots=True)
class OneDnn:
    """Weights reordered once for oneDNN on a CPU; F.linear reorders bfloat16 weights in every call."""

    name: str = "torch-onednn"
    expected_rows: int = 8  # the batch that the order is chosen for

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return OneDnnWeight(torch.ops.mkldnn._reorder_linear_weight(weight, self.expected_rows), bias)


def cpu_method(dtype: torch.dtype) -> QuantMethod:
    """The fastest dense method that this machine's torch has for `dtype`."""
    has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if dtype is torch.bfloat16 and has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return OneDnn()
    return Dense()
