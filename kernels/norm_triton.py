"""Triton kernels around the residual stream: embedding lookup, partial sums, residual and norm in one pass each.

The residual stream is float32. What is added to it comes as `[S, T, hidden]` partial sums, as a split-K product
(skinny_linear_triton.py) leaves them; a plain product has S = 1, one that was added already 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained


@triton.jit
def _normed(total, weight, columns, inside, hidden: tl.constexpr, eps):
    scale = tl.rsqrt(tl.sum(total * total, 0) / hidden + eps)
    return total * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _embed_norm(
    token_ids,
    table,
    weight,
    residual,
    normed,
    eps,
    hidden: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < hidden
    token = tl.load(token_ids + row).to(tl.int64)
    total = tl.load(table + token * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * hidden + columns
    tl.store(residual + at, total, mask=inside)
    tl.store(normed + at, _normed(total, weight, columns, inside, hidden, eps), mask=inside)


# Not specialised: the number of rows differs from step to step.
@triton.jit(do_not_specialize=["num_rows"])
def _add_norm(
    parts,
    num_rows,
    residual,
    weight,
    normed,
    eps,
    hidden: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < hidden
    at = row * hidden + columns
    total = tl.load(residual + at, mask=inside, other=0.0)
    for split in tl.static_range(SPLITS):
        part = parts + tl.cast(num_rows, tl.int64) * split * hidden
        total += tl.load(part + at, mask=inside, other=0.0).to(tl.float32)
    if SPLITS > 0:
        tl.store(residual + at, total, mask=inside)
    tl.store(normed + at, _normed(total, weight, columns, inside, hidden, eps), mask=inside)


def embed_norm(token_ids: Tensor, table: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """Look up `[T]` ids in `[vocab, hidden]`; `residual` [T, hidden] float32 becomes them; their norm out."""
    rows, hidden = residual.shape
    normed = torch.empty(rows, hidden, dtype=table.dtype, device=table.device)
    width = triton.next_power_of_2(hidden)
    _embed_norm[(rows,)](
        token_ids,
        table,
        weight,
        residual,
        normed,
        eps,
        hidden=hidden,
        WIDTH=width,
        num_warps=_warps(width),
        **chained(table.device),
    )
    return normed


def add_rms_norm(parts: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `[S, T, hidden]` to `residual` [T, hidden] float32, in place; the norm of the sum in weight's dtype."""
    splits, rows, hidden = parts.shape
    normed = torch.empty(rows, hidden, dtype=weight.dtype, device=weight.device)
    width = triton.next_power_of_2(hidden)
    _add_norm[(rows,)](
        parts,
        rows,
        residual,
        weight,
        normed,
        eps,
        hidden=hidden,
        WIDTH=width,
        SPLITS=splits,
        num_warps=_warps(width),
        **chained(weight.device),
    )
    return normed


def _warps(width: int) -> int:
    return max(1, min(16, width // 256))
