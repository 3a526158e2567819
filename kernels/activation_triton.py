"""Triton kernel of activation.py: the gated activation, over the partial sums of a split-K product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _silu_mul(
    parts, out, num_rows, inner: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inner
    gate = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        at = (split * tl.cast(num_rows, tl.int64) + row) * 2 * inner + columns
        gate += tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(parts + at + inner, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * inner + columns, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_and_mul(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """`silu(gate) * up` of the summed `[S, T, 2 * inner]`, gate half first, as `[T, inner]` of `dtype`."""
    splits, rows, doubled = parts.shape
    inner = doubled // 2
    out = torch.empty(rows, inner, dtype=dtype, device=parts.device)
    _silu_mul[(rows, triton.cdiv(inner, _BLOCK))](
        parts, out, rows, inner=inner, BLOCK=_BLOCK, SPLITS=splits, num_warps=4, **chained(parts.device)
    )
    return out
