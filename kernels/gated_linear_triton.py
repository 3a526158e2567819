"""Gate and up product of many rows, gated before it is written: `silu(gate) * up` of `x @ weight.T`.

cuBLAS has no such product: the gate would be a kernel of its own, which reads and writes three times what comes out
here. A program walks over tiles; the copy engine fetches the next tile's inputs while it gates this one. A tile of
gate and the one of up beside it are one operand, so that the matrix unit reads the rows once for both.

It is launched when the kernel before has ended: as its dependent (dependent_launch_triton.py) its programs would wait
on multiprocessors that the norm of so many rows still needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diptych.kernels.gpu import shared_bytes

_BLOCK_M = 128
_BLOCK_N = 128  # of gate, and as many of up
_BLOCK_K = 64
_STAGES = 3
_GROUP = 16  # tiles of rows that share a column of the weight in the L2 cache
_LEAST_ROWS = 512
_ALIGN = 8  # numbers: the copy engine's lines are multiples of 16 bytes
_SHARED_BYTES = 2 * (_STAGES * (_BLOCK_M + 2 * _BLOCK_N) * _BLOCK_K + _BLOCK_M * _BLOCK_N)  # and a few more


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: down the rows of a group, then on to the next column."""
    first = tile // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return first + within % size, within // size


@triton.jit(do_not_specialize=["num_rows"])
def _gated(
    x, weight, out, num_rows, inputs, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`x`, `weight` [2, inner, inputs] and `out` are descriptors: zeros beyond the tensor, and no writes."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(inner, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for at in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
            values = x.load([m * BLOCK_M, at])
            weights = weight.load([0, n * BLOCK_N, at]).reshape(2 * BLOCK_N, BLOCK_K)
            both = tl.dot(values, weights.T, both)
        gate, up = both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
        out.store([m * BLOCK_M, n * BLOCK_N], (gate * tl.sigmoid(gate) * up).to(out.dtype))


def pays(rows: int, weight: Tensor, num_sms: int) -> bool:
    """Whether `gated_linear` takes `[2 * inner, inputs]`, and cuBLAS with a gate apart would be slower.

    It is where the last round of tiles leaves few programs idle: measured on an H200, for 80 to 8192 rows, inner sizes
    of 1536 to 14336 and inputs of 576 to 4096. GPUs before Hopper have too little shared memory.
    """
    inner, inputs = len(weight) // 2, weight.shape[1]
    tiles = _num_tiles(rows, inner)
    return (
        rows >= _LEAST_ROWS
        and inner % _ALIGN == inputs % _ALIGN == 0
        and shared_bytes(weight.device) > _SHARED_BYTES
        and 10 * tiles >= 9 * num_sms * triton.cdiv(tiles, num_sms)
    )


def _num_tiles(rows: int, inner: int) -> int:
    return -(-rows // _BLOCK_M) * -(-inner // _BLOCK_N)


def gated_linear(x: Tensor, weight: Tensor, num_sms: int) -> Tensor:
    """`silu(gate) * up` [T, inner] in x's dtype, of `[T, inputs]` and `[2 * inner, inputs]`, gate half first.

    bfloat16 or float16; `inner` and `inputs` are multiples of 8, T is not 0.
    """
    rows, inputs = x.shape
    inner = len(weight) // 2
    out = torch.empty(rows, inner, dtype=x.dtype, device=x.device)
    _gated[(min(_num_tiles(rows, inner), num_sms),)](
        TensorDescriptor.from_tensor(x, [_BLOCK_M, _BLOCK_K]),
        TensorDescriptor.from_tensor(weight.view(2, inner, inputs), [2, _BLOCK_N, _BLOCK_K]),
        TensorDescriptor.from_tensor(out, [_BLOCK_M, _BLOCK_N]),
        rows, inputs, inner,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, STAGES=_STAGES, GROUP=_GROUP, num_warps=8,
    )  # fmt: skip
    return out
