"""The kernels that read or write FP8 against plain torch: random inputs, poisoned outputs and caches, odd sizes.

They run on a GPU, and with TRITON_INTERPRET=1 on any CPU that has Triton installed.
"""

import numpy as np
import pytest
import torch

from diptych.kernels import activation, attention
from diptych.kernels.flashinfer_attention import (
    AttentionShape,
    FlashInferPrefill,
    PagedContext,
    is_installed,
    workspace,
)
from diptych.worker.models.fp8_weights import FP8, FP8_MAX
from diptych.worker.models.fp8_weights import quantize_rows as quantize_in_torch
from diptych.worker.precision import has_fp8
from tests.kernels.test_triton_kernels import (
    DEVICE,
    INTERPRETED,
    ON_GPU,
    SHAPES,
    Heads,
    Paged,
    draw,
    error,
    poison,
)

__all__ = ["poison"]

# Before Hopper, float32 becomes FP8 by way of float16.
ROUNDS_TWICE = ON_GPU and torch.cuda.get_device_capability() < (9, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="there is no GPU, and TRITON_INTERPRET is not 1"),
    pytest.mark.skipif(ON_GPU and not has_fp8(DEVICE), reason="this GPU does not compute with FP8"),
]
NARROW = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]


class Fp8Paged(Paged):
    """As Paged, in FP8."""

    def __init__(self, lengths, *shape):
        super().__init__(lengths, *shape[:3], torch.float32, *shape[3:])
        self.pool = torch.full(self.pool.shape, torch.nan).to(FP8).to(DEVICE)
        self.cache = self.pool[:, 1]
        self.fill(lengths)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 576), (112, 1008), (256, 2048), (48, 4096)])
def test_skinny_linear(dtype, rows, outputs, inputs):
    from diptych.kernels.skinny_linear_triton import SkinnyPlan, choose_fp8, skinny_linear

    x = draw(rows, inputs, dtype=dtype)
    weight, scale = quantize_in_torch(draw(outputs, inputs) * torch.rand(outputs, 1, device=DEVICE))
    expected = x.double() @ (weight.double() * scale[:, None]).T
    other = SkinnyPlan(16, 64) if rows == 1 else SkinnyPlan(16, 64, 3, rows=16)
    for plan in (choose_fp8(rows, outputs, inputs, 132), other):
        parts = skinny_linear(x, weight, plan, scale)
        assert parts.shape == (plan.splits, rows, outputs)
        assert error(parts.sum(0), expected) < 1e-5


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("inner", "inputs"), [(96, 576), (56, 1008), (128, 2048)])
def test_skinny_gated(dtype, rows, inner, inputs):
    from diptych.kernels.skinny_linear_triton import FP8_GATED, SkinnyPlan, skinny_gated

    x = draw(rows, inputs, dtype=dtype)
    weight, scale = quantize_in_torch(draw(2 * inner, inputs, scale=inputs**-0.5))
    expected = activation.silu_and_mul(x.double() @ (weight.double() * scale[:, None]).T)
    for plan in (FP8_GATED, SkinnyPlan(32, 128)) if rows == 1 else (SkinnyPlan(16, 64, rows=16),):
        out = skinny_gated(x, weight, plan, scale)
        assert out.shape == (rows, inner)
        assert out.dtype == dtype
        assert error(out, expected) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter loses the carry when it rounds to FP8")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (5, 4096), (3, 14336), (40, 24)])
def test_quantize_rows(dtype, rows, width):
    from diptych.kernels.fp8_linear_triton import quantize_rows

    x = draw(rows, width, dtype=dtype) * torch.logspace(-3, 3, rows, device=DEVICE)[:, None].to(dtype)
    x[-1] = 0
    values, scales = quantize_rows(x)
    expected, expected_scales = quantize_in_torch(x)
    assert values.dtype == FP8
    assert torch.allclose(scales[:, 0], expected_scales, rtol=1e-6)
    # The largest number is the range's end; the kernel's division may be one place off, which rounds a few otherwise.
    assert (values[:-1].float().abs().amax(1) == FP8_MAX).all()
    assert (values.float() != expected.float()).float().mean() < (5e-3 if ROUNDS_TWICE else 1e-3)
    assert (values[-1].float() == 0).all()


@pytest.mark.skipif(not ON_GPU, reason="torch multiplies FP8 on a GPU only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(17, 96, 576), (64, 6144, 4096), (300, 256, 14336)])
def test_fp8_linear(dtype, rows, outputs, inputs):
    from diptych.kernels.fp8_linear_triton import fp8_linear, quantize_rows

    x = draw(rows, inputs, dtype=dtype)
    weight, scale = quantize_in_torch(draw(outputs, inputs, scale=inputs**-0.5))
    wide = (weight.double() * scale[:, None]).T
    narrow, row_scales = quantize_rows(x)
    actual = fp8_linear(x, weight, scale)
    assert (
        error(actual, (narrow.double() * row_scales) @ wide) < 6e-3
    )  # a bfloat16 result, summed in few digits
    assert error(actual, x.double() @ wide) < 0.04  # three bits of mantissa for each activation


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("shares", "tile"), [(1, 32), (4, 16), (2, 128)])
def test_decode_attention(dtype, shape, window, shares, tile):
    from diptych.kernels.decode_attention_triton import DecodePlan, decode_attention

    heads, kv_heads, dim, block = shape
    lengths = [1, 64, 65, 300, 17]
    paged = Fp8Paged(lengths, heads, kv_heads, dim, block)
    given = Heads(len(lengths) + 1, paged, shares, with_bias=tile == 16, with_norm=tile == 128)
    positions = [length - 1 for length in lengths]
    actual = torch.full((len(lengths) + 1, heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    decode_attention(
        given.parts,
        given.inputs,
        paged.cache,
        positions=paged.ints([*positions, -1]),
        slots=paged.ints([*paged.slots, -1]),
        tables=paged.tables,
        scale=dim**-0.5,
        window=window,
        plan=DecodePlan(shares, tile, stages=2 if tile == 32 else 5, num_warps=4 if tile == 128 else 1),
        arrivals=torch.zeros((len(lengths) + 1) * kv_heads, dtype=torch.int32, device=DEVICE),
        out=actual,
    )
    query, key, value = given.split(positions)
    plan = paged.plan([(index, length - 1, length) for index, length in enumerate(lengths)], window)
    for which, wide in enumerate((key, value)):
        check_stored(paged.cache[plan.slot_blocks, which, :, plan.slot_offsets], wide)
    expected = attention.paged_attention(query.to(dtype).double(), paged.cache.double(), plan, dim**-0.5)
    assert actual.isfinite().all()
    assert (actual[-1] == 0).all()
    assert error(actual[:-1], expected) < (2e-3 if dtype == torch.float16 else 5e-3)


def check_stored(stored, wide):
    expected = wide.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()
    if ON_GPU:  # the interpreter loses the carry when it rounds to FP8
        assert (stored.float() != expected).float().mean() < 1e-2, "near ties only"
        assert error(stored.float(), expected) < (1.5e-2 if ROUNDS_TWICE else 1e-2)


class Prompts:
    """Runs of rows over a paged context, some of which begin in its middle."""

    def __init__(self, dim):
        self.heads, kv_heads, self.block = 8, 2, 16
        self.lengths, self.starts = np.array([130, 5, 64, 201], np.int32), np.array([0, 4, 0, 77], np.int32)
        self.counts = self.lengths - self.starts
        self.paged = Fp8Paged(self.lengths.tolist(), self.heads, kv_heads, dim, self.block)
        self.query_starts = np.cumsum([0, *self.counts]).astype(np.int32)
        self.scale = dim**-0.5

    def error(self, query, out, window=None):
        spans = [(index, *span) for index, span in enumerate(zip(self.starts, self.lengths, strict=True))]
        plan = self.paged.plan(spans, window)
        expected = attention.paged_attention(query.double(), self.paged.cache.double(), plan, self.scale)
        return error(out, expected)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("window", [None, 40])
def test_prefill_attention(dtype, window):
    from diptych.kernels.prefill_attention_triton import PrefillPlan, prefill_attention

    prompts = Prompts(dim=64)
    query = draw(sum(prompts.counts), prompts.heads, 64, dtype=dtype)
    out = torch.full_like(query, torch.nan)
    prefill_attention(
        query,
        prompts.paged.cache,
        PrefillPlan.of(prompts.query_starts, prompts.starts, DEVICE),
        slots=prompts.paged.ints(np.repeat(prompts.paged.slots, prompts.counts).tolist()),
        tables=prompts.paged.tables,
        scale=prompts.scale,
        window=window,
        out=out,
    )
    assert prompts.error(query, out, window) < (2e-3 if dtype == torch.float16 else 5e-3)


@pytest.mark.skipif(not (ON_GPU and is_installed()), reason="flashinfer is not installed")
def test_flashinfer_prefill():
    prompts = Prompts(dim=128)
    query = draw(sum(prompts.counts), prompts.heads, 128, dtype=torch.bfloat16)
    out = torch.full_like(query, torch.nan)
    shape = AttentionShape(prompts.heads, 2, 128, prompts.block, prompts.scale, None, torch.bfloat16, FP8)
    prefill = FlashInferPrefill(shape, workspace(DEVICE))
    context = PagedContext.of(prompts.paged.host_tables.tolist(), prompts.lengths, prompts.block)
    prefill.plan(prompts.query_starts, context)
    prefill.run(query, prompts.paged.cache, out)
    assert prompts.error(query, out) < 1e-2


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "splits"), [(4, 2, 64, 1), (9, 3, 96, 2), (20, 4, 32, 1)]
)
def test_rope_append(heads, kv_heads, dim, splits):
    from diptych.kernels.rope_triton import rope_append

    paged = Fp8Paged([40, 1, 17], heads, kv_heads, dim, 16)
    paged.cache[:] = torch.full(paged.cache.shape, torch.nan).to(FP8).to(DEVICE)
    positions = [39, 0, 16]
    given = Heads(4, paged, splits)
    given.parts[0, 1] *= 1000  # beyond the range
    query = rope_append(
        given.parts,
        given.inputs,
        positions=paged.ints([*positions, -1]),
        slots=paged.ints([*paged.slots, -1]),
        tables=paged.tables,
        cache=paged.cache,
        dtype=torch.bfloat16,
    )
    q, k, v = given.split(positions)
    assert query.dtype == torch.bfloat16
    assert error(query[:3], q) < 1e-2
    plan = paged.plan([(index, position, position + 1) for index, position in enumerate(positions)])
    for which, wide in enumerate((k, v)):
        check_stored(paged.cache[plan.slot_blocks, which, :, plan.slot_offsets], wide)
        assert paged.cache[:, which].float().nan_to_num().abs().max() == FP8_MAX
    assert (~paged.pool.float().isnan()).sum() == 3 * 2 * kv_heads * dim, "nothing else was written"
