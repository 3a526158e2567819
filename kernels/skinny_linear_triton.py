"""Products of a few rows with a large weight: reads the weight once, at memory speed.

cuBLAS leaves a quarter of the bandwidth unused for the smaller weights of a decode step. Here each program takes some
outputs and a share of the inputs (split-K); the shares' sums stay apart, `[S, T, outputs]` float32, and the kernel
that reads the result anyway adds them up. Of a gate and up weight the product can come out gated. A weight in FP8 is
made wide in registers: its bytes are what takes the time, and the rows keep all of their digits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained

MAX_ROWS = 16
_DOT_ROWS = 16  # the least that the matrix unit takes


@triton.jit
def _weight_tile(line, columns, rows, end, outputs, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(line + columns[None, :])
    return tl.load(
        line + columns[None, :], mask=(rows < outputs)[:, None] & (columns < end)[None, :], other=0.0
    )


@triton.jit
def _added(total, tile, values, TOKENS: tl.constexpr):
    """One row needs no matrix unit, and one sum at the end."""
    if TOKENS == 1:
        total += tile.to(tl.float32) * values.to(tl.float32)[None, :]
    else:
        if tile.dtype.is_fp8():  # straight to bfloat16 it would be an instruction of a quarter of the rate
            tile = tile.to(tl.float32)
        total = tl.dot(tile.to(values.dtype), values, total)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    x, weight, scale, out, num_rows, inputs, outputs, share,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    start = split * share
    end = tl.minimum(start + share, inputs)
    line = weight + rows.to(tl.int64)[:, None] * inputs
    upper = line + tl.cast(outputs, tl.int64) * inputs
    follow(PDL)
    tokens = tl.arange(0, TOKENS)
    lanes = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K if TOKENS == 1 else TOKENS], tl.float32)
    above = tl.zeros([BLOCK_N, BLOCK_K if TOKENS == 1 else TOKENS], tl.float32)
    for at in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        columns = at + lanes
        if TOKENS == 1:
            values = tl.load(x + columns, mask=columns < end, other=0.0)
        else:
            here = (tokens < num_rows)[None, :] & (columns < end)[:, None]
            values = tl.load(x + tokens[None, :] * inputs + columns[:, None], mask=here, other=0.0)
        total = _added(total, _weight_tile(line, columns, rows, end, outputs, EVEN), values, TOKENS)
        if GATED:
            above = _added(above, _weight_tile(upper, columns, rows, end, outputs, EVEN), values, TOKENS)
    if TOKENS == 1:
        total = tl.sum(total, 1)[:, None]
        above = tl.sum(above, 1)[:, None]
    if SCALED:
        total *= tl.load(scale + rows, mask=rows < outputs, other=0.0)[:, None]
        if GATED:
            above *= tl.load(scale + outputs + rows, mask=rows < outputs, other=0.0)[:, None]
    if GATED:
        total = total * tl.sigmoid(total) * above
    to = out + (split * num_rows + tokens)[None, :].to(tl.int64) * outputs + rows[:, None]
    tl.store(to, total, mask=(tokens < num_rows)[None, :] & (rows < outputs)[:, None])


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How a weight is shared out among programs."""

    block_n: int
    block_k: int
    splits: int = 1
    num_warps: int = 4
    stages: int = 4


def choose(num_rows: int, outputs: int, inputs: int, num_sms: int) -> SkinnyPlan:
    """What was fastest on an H200, for outputs of 576 to 128256 and inputs of 576 to 14336."""
    if num_rows == 1:
        return SkinnyPlan(8, 1024 if inputs >= 2048 else 256, stages=3)
    block_k = 128 if inputs >= 2048 else 64
    splits = 1
    while splits < 8 and -(-outputs // 64) * splits < 1.4 * num_sms and inputs >= 2 * splits * block_k:
        splits *= 2
    return SkinnyPlan(64, block_k, splits)


def choose_gated(num_rows: int, inputs: int) -> SkinnyPlan:
    """For a gate and up weight, whose product must not be split."""
    if num_rows == 1:
        return SkinnyPlan(4, 1024 if inputs >= 2048 else 256, stages=3)
    return SkinnyPlan(32, 64)


def choose_fp8(num_rows: int, outputs: int, inputs: int, num_sms: int) -> SkinnyPlan:
    """As choose, for a weight in FP8."""
    if num_rows == 1 and inputs >= 2048:
        return SkinnyPlan(8, 1024 if outputs < 6144 else 512, stages=3)
    if num_rows == 1 or num_rows > 16:
        return choose(num_rows, outputs, inputs, num_sms)
    block_k = 256 if inputs >= 2048 else 64
    splits = 1
    while splits < 8 and -(-outputs // 32) * splits < 3 * num_sms and inputs >= 2 * splits * block_k:
        splits *= 2
    return SkinnyPlan(32, block_k, splits)


def choose_fp8_gated(num_rows: int, inputs: int) -> SkinnyPlan:
    """As choose_gated, for a weight in FP8; of several rows the product and a gate apart are faster."""
    if num_rows == 1:
        return SkinnyPlan(16, 256, stages=3)
    return SkinnyPlan(32, 128 if inputs >= 2048 else 64)


def skinny_linear(x: Tensor, weight: Tensor, plan: SkinnyPlan, scale: Tensor | None = None) -> Tensor:
    """`x @ weight.T` of `[T, inputs]`, T at most 64, and `[outputs, inputs]`, as `[splits, T, outputs]` float32.

    `scale`, `[outputs]` float32, multiplies the outputs: that of a weight in float8_e4m3fn.
    """
    outputs = weight.shape[0]
    out = torch.empty(plan.splits, len(x), outputs, dtype=torch.float32, device=x.device)
    _launch(x, weight, scale, out, outputs, plan)
    return out


def skinny_gated(x: Tensor, weight: Tensor, plan: SkinnyPlan, scale: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` [T, inner] of x's dtype, of `x @ weight.T` with `[2 * inner, inputs]`, gate half first.

    `scale` as that of `skinny_linear`.
    """
    inner = weight.shape[0] // 2
    out = torch.empty(len(x), inner, dtype=x.dtype, device=x.device)
    _launch(x, weight, scale, out, inner, plan, gated=True)
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    outputs: int,
    plan: SkinnyPlan,
    *,
    gated: bool = False,
) -> None:
    rows, inputs = x.shape
    share = triton.cdiv(triton.cdiv(inputs, plan.splits), plan.block_k) * plan.block_k
    even = outputs % plan.block_n == 0 and inputs % (plan.splits * plan.block_k) == 0
    _product[(triton.cdiv(outputs, plan.block_n), plan.splits)](
        x, weight, weight if scale is None else scale, out, rows, inputs, outputs, share,
        TOKENS=1 if rows == 1 else max(_DOT_ROWS, triton.next_power_of_2(rows)),
        BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, STAGES=plan.stages, EVEN=even, GATED=gated,
        SCALED=scale is not None,
        num_warps=plan.num_warps, **chained(x.device),
    )  # fmt: skip
