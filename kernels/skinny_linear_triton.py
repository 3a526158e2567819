"""Products of a few rows with a large weight: reads the weight once, at memory speed.

cuBLAS leaves a quarter of the bandwidth unused for the smaller weights of a decode step. Here each program takes some
outputs and a share of the inputs (split-K); the shares' sums stay apart, `[S, T, outputs]` float32, and the kernel
that reads the result anyway adds them up.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained

MAX_ROWS = 16
_DOT_ROWS = tl.constexpr(16)  # the least that the matrix unit takes


@triton.jit
def _weight_tile(line, columns, rows, end, outputs, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(line + columns[None, :])
    return tl.load(
        line + columns[None, :], mask=(rows < outputs)[:, None] & (columns < end)[None, :], other=0.0
    )


@triton.jit
def _vector(
    x,
    weight,
    out,
    inputs,
    outputs,
    share,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: no matrix unit, 16-byte loads of the weight and one sum at the end."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    start = split * share
    end = tl.minimum(start + share, inputs)
    lanes = tl.arange(0, BLOCK_K)
    line = weight + rows.to(tl.int64)[:, None] * inputs
    # The first piece of the weight is on its way before the kernel that makes `x` is over.
    tile = _weight_tile(line, start + lanes, rows, end, outputs, EVEN)
    follow(PDL)
    values = tl.load(x + start + lanes, mask=start + lanes < end, other=0.0)
    total = tile.to(tl.float32) * values.to(tl.float32)[None, :]
    for at in tl.range(start + BLOCK_K, end, BLOCK_K, num_stages=4):
        columns = at + lanes
        tile = _weight_tile(line, columns, rows, end, outputs, EVEN)
        values = tl.load(x + columns, mask=columns < end, other=0.0)
        total += tile.to(tl.float32) * values.to(tl.float32)[None, :]
    to = out + split.to(tl.int64) * outputs + rows
    tl.store(to, tl.sum(total, 1), mask=rows < outputs)


@triton.jit(do_not_specialize=["num_rows"])
def _few(
    x,
    weight,
    out,
    num_rows,
    inputs,
    outputs,
    share,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Up to 16 rows, as the narrow side of a matrix product."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    start = split * share
    end = tl.minimum(start + share, inputs)
    lanes = tl.arange(0, BLOCK_K)
    tokens = tl.arange(0, _DOT_ROWS)
    line = weight + rows.to(tl.int64)[:, None] * inputs
    follow(PDL)
    total = tl.zeros([BLOCK_N, _DOT_ROWS], tl.float32)
    for at in tl.range(start, end, BLOCK_K, num_stages=4):
        columns = at + lanes
        tile = _weight_tile(line, columns, rows, end, outputs, EVEN)
        here = (tokens < num_rows)[None, :] & (columns < end)[:, None]
        values = tl.load(x + tokens[None, :] * inputs + columns[:, None], mask=here, other=0.0)
        total = tl.dot(tile, values, total)
    to = out + (split * num_rows + tokens)[None, :].to(tl.int64) * outputs + rows[:, None]
    tl.store(to, total, mask=(tokens < num_rows)[None, :] & (rows < outputs)[:, None])


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How a weight is shared out among programs."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int


def choose(num_rows: int, outputs: int, inputs: int, num_sms: int) -> SkinnyPlan:
    """What was fastest on an H200, for outputs of 576 to 128256 and inputs of 576 to 14336."""
    if num_rows == 1:
        block_k = 256 if inputs <= 4096 and outputs <= 8192 else 512
        splits = 2 if outputs // 8 < 2 * num_sms and inputs >= 512 else 1
        return SkinnyPlan(8, block_k, splits, 4)
    block_k = 128 if inputs >= 2048 else 64
    splits = 1
    while splits < 8 and -(-outputs // 64) * splits < 1.4 * num_sms and inputs >= 2 * splits * block_k:
        splits *= 2
    return SkinnyPlan(64, block_k, splits, 4)


def skinny_linear(x: Tensor, weight: Tensor, plan: SkinnyPlan) -> Tensor:
    """`x @ weight.T` of `[T, inputs]`, T at most 16, and `[outputs, inputs]`, as `[splits, T, outputs]` float32."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = torch.empty(plan.splits, rows, outputs, dtype=torch.float32, device=x.device)
    share = triton.cdiv(triton.cdiv(inputs, plan.splits), plan.block_k) * plan.block_k
    grid = (triton.cdiv(outputs, plan.block_n), plan.splits)
    even = outputs % plan.block_n == 0 and inputs % (plan.splits * plan.block_k) == 0
    blocks = {"BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, "EVEN": even, "num_warps": plan.num_warps}
    blocks |= chained(x.device)
    if rows == 1:
        _vector[grid](x, weight, out, inputs, outputs, share, **blocks)
    else:
        _few[grid](x, weight, out, rows, inputs, outputs, share, **blocks)
    return out
