"""Products of few rows with a large weight: reads the weight once, at memory speed.

cuBLAS leaves a quarter of the bandwidth unused for the smaller weights of a decode step. Here each program takes some
outputs and a share of the inputs (split-K); the shares' sums stay apart, `[S, T, outputs]` float32, and the kernel
that reads the result anyway adds them up. Of a gate and up weight the product can come out gated. A weight in FP8 is
made wide in registers: its bytes are what takes the time, and the rows keep all of their digits.

One row is multiplied without the matrix unit; of more, tiles come through tensor descriptors (the copy engine of
Hopper GPUs), which keeps the threads free for the products.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diptych.kernels.dependent_launch_triton import follow, release, wait
from diptych.kernels.gpu import chained

MAX_ROWS = 64
_DOT_ROWS = 16  # the least that the matrix unit takes
_SHARED_BYTES = 224 << 10  # of a multiprocessor
_DESCRIPTOR_ALIGN = 16  # bytes


@triton.jit
def _weight_tile(line, columns, rows, outputs, inputs, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(line + columns[None, :])
    inside = (rows < outputs)[:, None] & (columns < inputs)[None, :]
    return tl.load(line + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _vector(
    x, weight, scale, out, inputs, outputs,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: 16-byte loads of the weight, and one sum at the end."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = weight + rows.to(tl.int64)[:, None] * inputs
    upper = line + tl.cast(outputs, tl.int64) * inputs
    follow(PDL)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    above = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for at in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        columns = at + tl.arange(0, BLOCK_K)
        values = tl.load(x + columns, mask=columns < inputs, other=0.0).to(tl.float32)[None, :]
        total += _weight_tile(line, columns, rows, outputs, inputs, EVEN).to(tl.float32) * values
        if GATED:
            above += _weight_tile(upper, columns, rows, outputs, inputs, EVEN).to(tl.float32) * values
    found = tl.sum(total, 1)
    other = tl.sum(above, 1)
    if SCALED:
        found *= tl.load(scale + rows, mask=rows < outputs, other=0.0)
        if GATED:
            other *= tl.load(scale + outputs + rows, mask=rows < outputs, other=0.0)
    if GATED:
        found = found * tl.sigmoid(found) * other
    tl.store(out + rows, found, mask=rows < outputs)


@triton.jit
def _added(total, tile, values):
    if tile.dtype.is_fp8():  # straight to bfloat16 it would be an instruction of a quarter of the rate
        tile = tile.to(tl.float32)
    return tl.dot(tile.to(values.dtype), values, total)


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    x, weight, scale, out, num_rows, inputs, outputs, share,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`x` and `weight` are descriptors: what they load beyond the tensor is zero."""
    first_row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    wait(PDL)
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    above = tl.zeros([BLOCK_N, ROWS], tl.float32)
    start = split * share
    for at in tl.range(start, tl.minimum(start + share, inputs), BLOCK_K, num_stages=STAGES):
        values = x.load([first_row, at]).T
        total = _added(total, weight.load([column, at]), values)
        if GATED:
            above = _added(above, weight.load([outputs + column, at]), values)
    release(PDL)
    columns = column + tl.arange(0, BLOCK_N)
    inside = columns < outputs
    if SCALED:
        total *= tl.load(scale + columns, mask=inside, other=0.0)[:, None]
        if GATED:
            above *= tl.load(scale + outputs + columns, mask=inside, other=0.0)[:, None]
    if GATED:
        total = total * tl.sigmoid(total) * above
    rows = first_row + tl.arange(0, ROWS)
    to = out + (split * num_rows + rows)[:, None].to(tl.int64) * outputs + columns[None, :]
    tl.store(to, total.T, mask=(rows < num_rows)[:, None] & inside[None, :])


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How a weight is shared out among programs."""

    block_n: int
    block_k: int
    splits: int = 1  # 1 for a single row
    num_warps: int = 4
    stages: int = 4
    rows: int = 1  # of one program

    @classmethod
    def tiled(
        cls,
        num_rows: int,
        inputs: int,
        block_n: int,
        block_k: int,
        splits: int = 1,
        *,
        num_warps: int = 4,
        weight_bytes: int = 2,
        gated: bool = False,
    ) -> "SkinnyPlan":
        """For several rows: as many stages as let two programs share a multiprocessor, few for few steps."""
        rows = max(_DOT_ROWS, triton.next_power_of_2(num_rows))
        stage_bytes = block_k * (block_n * weight_bytes * (2 if gated else 1) + rows * 2)
        steps = inputs // splits // block_k
        stages = max(2, min(8, max(4, steps), _SHARED_BYTES // 2 // stage_bytes))
        return cls(block_n, block_k, splits, num_warps, stages, rows)


FP8_GATED = SkinnyPlan(16, 256, stages=3)  # for one row; of more, a gate apart is faster


def takes(weight: Tensor) -> bool:
    """Whether descriptors can show `[outputs, inputs]`."""
    return weight.shape[1] * weight.itemsize % _DESCRIPTOR_ALIGN == 0


def choose(num_rows: int, outputs: int, inputs: int, num_sms: int) -> SkinnyPlan:
    """What was fastest on an H200, for outputs of 576 to 128256 and inputs of 576 to 14336."""
    if num_rows == 1:
        return SkinnyPlan(8, 1024 if inputs >= 2048 else 256, stages=3)
    block_k = 128 if inputs >= 2048 else 64
    splits = _splits(outputs, 64, inputs, block_k, 1.4 * num_sms)
    return SkinnyPlan.tiled(num_rows, inputs, 64, block_k, splits)


def choose_gated(num_rows: int, inner: int, inputs: int, num_sms: int) -> SkinnyPlan | None:
    """As choose, for a gate and up weight, whose product must not be split; None: better with a gate apart."""
    if num_rows == 1:
        return SkinnyPlan(4, 1024 if inputs >= 2048 else 256, stages=3)
    if inner < 64 * num_sms:
        return None
    return SkinnyPlan.tiled(num_rows, inputs, 64, 128, gated=True)


def choose_fp8(num_rows: int, outputs: int, inputs: int, num_sms: int) -> SkinnyPlan:
    """As choose, for a weight in FP8."""
    if num_rows == 1:
        block_k = 256 if inputs < 2048 else 1024 if outputs < 6144 else 512
        return SkinnyPlan(8, block_k, stages=3)
    if num_rows > 32 or outputs >= 128 * num_sms:
        splits = _splits(outputs, 128, inputs, 128, 1.4 * num_sms, most=8)
        return SkinnyPlan.tiled(num_rows, inputs, 128, 128, splits, num_warps=8, weight_bytes=1)
    block_k = 256 if inputs >= 2048 else 64
    splits = _splits(outputs, 64, inputs, block_k, 1.9 * num_sms)
    return SkinnyPlan.tiled(num_rows, inputs, 64, block_k, splits, weight_bytes=1)


def _splits(outputs: int, block_n: int, inputs: int, block_k: int, programs: float, most: int = 4) -> int:
    """The first power of two that gives so many programs."""
    splits = 1
    while splits < most and -(-outputs // block_n) * splits < programs and inputs >= 2 * splits * block_k:
        splits *= 2
    return splits


def skinny_linear(x: Tensor, weight: Tensor, plan: SkinnyPlan, scale: Tensor | None = None) -> Tensor:
    """`x @ weight.T` of `[T, inputs]`, and `[outputs, inputs]`, as `[splits, T, outputs]` float32.

    Several rows need a weight that `takes` takes. `scale`, `[outputs]` float32, multiplies the outputs: that of a
    weight in float8_e4m3fn.
    """
    outputs = weight.shape[0]
    out = torch.empty(plan.splits, len(x), outputs, dtype=torch.float32, device=x.device)
    _launch(x, weight, scale, out, outputs, plan)
    return out


def skinny_gated(x: Tensor, weight: Tensor, plan: SkinnyPlan, scale: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` [T, inner] of x's dtype, of `x @ weight.T` with `[2 * inner, inputs]`, gate half first.

    `weight` and `scale` as those of `skinny_linear`.
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
    num_rows, inputs = x.shape
    scales = out if scale is None else scale
    options = {
        "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, "STAGES": plan.stages, "num_warps": plan.num_warps,
        "GATED": gated, "SCALED": scale is not None, **chained(x.device),
    }  # fmt: skip
    num_blocks = triton.cdiv(outputs, plan.block_n)
    if num_rows == 1:
        even = outputs % plan.block_n == 0 and inputs % plan.block_k == 0
        _vector[(num_blocks,)](x, weight, scales, out, inputs, outputs, EVEN=even, **options)
        return
    share = triton.cdiv(triton.cdiv(inputs, plan.splits), plan.block_k) * plan.block_k
    _product[(triton.cdiv(num_rows, plan.rows), num_blocks, plan.splits)](
        TensorDescriptor.from_tensor(x, [plan.rows, plan.block_k]),
        TensorDescriptor.from_tensor(weight, [plan.block_n, plan.block_k]),
        scales, out, num_rows, inputs, outputs, share, ROWS=plan.rows, **options,
    )  # fmt: skip
