"""The Triton kernels against the plain torch ones: random inputs, poisoned outputs and caches, odd sizes.

They run on a GPU, and with TRITON_INTERPRET=1 on any CPU that has Triton installed.
"""

import itertools
import os

import numpy as np
import pytest
import torch

from diptych.kernels import activation, attention, norm, rope
from diptych.kernels.flashinfer_attention import (
    AttentionShape,
    FlashInferPrefill,
    PagedContext,
    is_installed,
    workspace,
)

ON_GPU = torch.cuda.is_available()
INTERPRETED = not ON_GPU and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="there is no GPU, and TRITON_INTERPRET is not 1"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The interpreter multiplies the bits of bfloat16 matrices as if they were whole numbers.
DOT_DTYPES = DTYPES[1:] if INTERPRETED else DTYPES
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel does not write shows: fresh memory holds numbers that are none."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        tensor = plain(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda other: poisoned(other.shape, dtype=other.dtype, device=other.device)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "splits"), [(1, 576, 1), (3, 4096, 4), (7, 24, 2), (5, 100, 0)])
def test_add_rms_norm(dtype, rows, hidden, splits):
    from diptych.kernels.norm_triton import add_rms_norm

    parts, residual = draw(splits, rows, hidden), draw(rows, hidden)
    weight = draw(hidden, dtype=dtype)
    expected, total = norm.add_rms_norm(parts.sum(0), residual.clone(), weight, 1e-5)
    actual = add_rms_norm(parts, residual, weight, 1e-5)
    assert actual.dtype == dtype
    assert error(actual, expected) < TOLERANCE[dtype]
    assert error(residual, total) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_norm(dtype):
    from diptych.kernels.norm_triton import embed_norm

    table, weight = draw(50, 72, dtype=dtype), draw(72, dtype=dtype)
    ids = torch.tensor([3, 49, 0, 3, 17], dtype=torch.int32, device=DEVICE)
    residual = torch.full((5, 72), torch.nan, device=DEVICE)
    actual = embed_norm(ids, table, weight, 1e-5, residual)
    assert torch.equal(residual, table[ids.long()].float())
    assert error(actual, norm.rms_norm(residual, weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "splits"), [(1, 1536, 1), (5, 1100, 3)])
def test_silu_and_mul(dtype, rows, inner, splits):
    from diptych.kernels.activation_triton import silu_and_mul

    parts = draw(splits, rows, 2 * inner)
    actual = silu_and_mul(parts, dtype)
    assert actual.dtype == dtype
    assert error(actual, activation.silu_and_mul(parts.sum(0))) < TOLERANCE[dtype]


SKINNY_DTYPES = [dtype for dtype in DOT_DTYPES if dtype != torch.float32]


@pytest.mark.parametrize("dtype", SKINNY_DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 576), (100, 1000), (256, 2048), (40, 4096)])
def test_skinny_linear(dtype, rows, outputs, inputs):
    from diptych.kernels.skinny_linear_triton import SkinnyPlan, choose, skinny_linear

    x, weight = draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    expected = x.double() @ weight.double().T
    other = SkinnyPlan(16, 64) if rows == 1 else SkinnyPlan(16, 64, 3, rows=16)
    chosen = choose(rows, outputs, inputs, 132 if rows <= 64 else 2 * -(-outputs // 128))
    assert chosen is not None
    for plan in (chosen, other):
        parts = skinny_linear(x, weight, plan)
        assert parts.shape == (plan.splits, rows, outputs)
        assert error(parts.sum(0), expected) < 1e-5


@pytest.mark.parametrize("dtype", SKINNY_DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40, 200])
@pytest.mark.parametrize(("inner", "inputs"), [(96, 576), (50, 1000), (128, 2048)])
def test_skinny_gated(dtype, rows, inner, inputs):
    from diptych.kernels.skinny_linear_triton import SkinnyPlan, choose_gated, skinny_gated

    x, weight = draw(rows, inputs, dtype=dtype), draw(2 * inner, inputs, dtype=dtype, scale=inputs**-0.5)
    expected = activation.silu_and_mul(x.double() @ weight.double().T)
    other = SkinnyPlan(16, 64, rows=1 if rows == 1 else 16)
    for plan in filter(None, (choose_gated(rows, inner, inputs, 1), other)):
        out = skinny_gated(x, weight, plan)
        assert out.shape == (rows, inner) and out.dtype == dtype
        assert error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", SKINNY_DTYPES)
@pytest.mark.parametrize("rows", [1, 130, 2100])
@pytest.mark.parametrize(("inner", "inputs"), [(136, 72), (96, 576), (1024, 64)])
def test_gated_linear(dtype, rows, inner, inputs, monkeypatch):
    """Programs with one tile and with several, tiles and groups that are not full."""
    from diptych.kernels import gated_linear_triton
    from diptych.kernels.gated_linear_triton import gated_linear, pays

    x, weight = draw(rows, inputs, dtype=dtype), draw(2 * inner, inputs, dtype=dtype, scale=inputs**-0.5)
    out = gated_linear(x, weight, 5)
    assert out.shape == (rows, inner) and out.dtype == dtype
    assert error(out, activation.silu_and_mul(x.double() @ weight.double().T)) < TOLERANCE[dtype]
    for kib, has_room in ((227, True), (163, False)):  # a Hopper GPU, and one of those before
        monkeypatch.setattr(gated_linear_triton, "shared_bytes", lambda device, kib=kib: kib << 10)
        assert pays(rows, weight, 1) == (has_room and rows > 1000)
        assert not pays(rows, weight[: 2 * inner - 8], 1)


class Paged:
    """Sequences whose K and V lie in one layer of a NaN-filled pool, at scattered blocks."""

    def __init__(self, lengths, heads, kv_heads, dim, dtype, block=16):
        self.heads, self.kv_heads, self.dim, self.block, self.dtype = heads, kv_heads, dim, block, dtype
        per_sequence = -(-max(lengths) // block)
        count = len(lengths)
        self.pool = torch.full(
            (count * per_sequence, 3, 2, kv_heads, block, dim), torch.nan, device=DEVICE, dtype=dtype
        )
        self.cache = self.pool[:, 1]
        blocks = np.random.default_rng(len(lengths)).permutation(count * per_sequence).astype(np.int32)
        self.host_tables = blocks.reshape(count, per_sequence)
        # Slots in another order than sequences, and more of them.
        self.slots = [2 * count - 1 - 2 * index for index in range(count)]
        self.tables = torch.full((2 * count, per_sequence), 2**30, dtype=torch.int32, device=DEVICE)
        for index, slot in enumerate(self.slots):
            self.tables[slot] = torch.from_numpy(self.host_tables[index])

    def plan(self, spans, window=None):
        counts = [stop - start for _, start, stop in spans]
        return attention.plan_attention(
            positions=np.concatenate([np.arange(start, stop, dtype=np.int32) for _, start, stop in spans]),
            query_starts=np.cumsum([0, *counts]),
            block_tables=self.host_tables[[index for index, _, _ in spans]],
            tokens_per_block=self.block,
            sliding_window=window,
            device=DEVICE,
        )

    def fill(self, lengths):
        for index, length in enumerate(lengths):
            if length:
                key, value = (draw(length, self.kv_heads, self.dim, dtype=self.dtype) for _ in range(2))
                attention.append_kv(key, value, self.cache, self.plan([(index, 0, length)]))

    def ints(self, values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)


SHAPES = [(8, 2, 64, 16), (9, 3, 64, 32), (4, 4, 128, 16), (40, 2, 32, 32)]


class Heads:
    """Products of rows, as a kernel takes them, and the heads that they are."""

    def __init__(self, rows, paged, splits=1, *, with_bias=False, with_norm=False):
        from diptych.kernels.rope_triton import HeadInputs, HeadLayout

        heads, kv_heads, dim, dtype = paged.heads, paged.kv_heads, paged.dim, paged.dtype
        width = (heads + 2 * kv_heads) * dim
        self.layout = HeadLayout(heads, kv_heads, dim, 1e-6)
        self.parts = draw(splits, rows, width)
        self.turns = torch.rand(512, dim // 2, device=DEVICE) * 6
        self.inputs = HeadInputs(
            layout=self.layout,
            bias=draw(width, dtype=dtype) if with_bias else None,
            norms=(draw(dim, dtype=dtype), draw(dim, dtype=dtype)) if with_norm else None,
            angles=(self.turns.cos(), self.turns.sin()),
        )

    def split(self, positions):
        """Turned queries and keys, and values, `[rows, heads, dim]` float32 each, of the rows with `positions`."""
        layout, inputs = self.layout, self.inputs
        rows = self.parts.sum(0) + (0 if inputs.bias is None else inputs.bias.float())
        counts = [layout.num_heads, layout.num_kv_heads, layout.num_kv_heads]
        q, k, v = rows.view(len(rows), -1, layout.head_dim)[: len(positions)].split(counts, 1)
        if inputs.norms is not None:
            q, k = (norm.rms_norm(x, w.float(), 1e-6) for x, w in zip((q, k), inputs.norms, strict=True))
        at = self.turns[positions]
        q, k = (rope.apply_rope(x, at.cos(), at.sin()) for x in (q, k))
        return q, k, v


# Each of these is compiled, seconds long: the other dtypes have one shape.
DECODES = [
    (dtype, shape, window)
    for dtype in DOT_DTYPES
    for shape in (SHAPES if dtype is DOT_DTYPES[0] else SHAPES[:1])
    for window in ([None, 1, 50] if dtype is DOT_DTYPES[0] else [None])
]


@pytest.mark.parametrize(("dtype", "shape", "window"), DECODES)
@pytest.mark.parametrize(("shares", "tile"), [(1, 32), (4, 16), (2, 128)])
def test_decode_attention(dtype, shape, window, shares, tile):
    from diptych.kernels.decode_attention_triton import DecodePlan, decode_attention

    heads, kv_heads, dim, block = shape
    lengths = [1, 64, 65, 300, 17]
    paged = Paged(lengths, heads, kv_heads, dim, dtype, block)
    paged.fill([length - 1 for length in lengths])  # the kernel appends the last one
    given = Heads(len(lengths) + 1, paged, shares, with_bias=tile == 16, with_norm=tile == 128)
    positions = [length - 1 for length in lengths]
    actual = torch.full((len(lengths) + 1, heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    arrivals = torch.zeros((len(lengths) + 1) * kv_heads, dtype=torch.int32, device=DEVICE)
    written = int((~paged.pool.isnan()).sum())
    decode_attention(
        given.parts,
        given.inputs,
        paged.cache,
        positions=paged.ints([*positions, -1]),
        slots=paged.ints([*paged.slots, -1]),
        tables=paged.tables,
        scale=dim**-0.5,
        window=window,
        plan=DecodePlan(shares, tile, stages=2 if tile == 32 else 3, num_warps=4 if tile == 128 else 1),
        arrivals=arrivals,
        out=actual,
    )
    query, key, value = given.split(positions)
    spans = [(index, length - 1, length) for index, length in enumerate(lengths)]
    plan = paged.plan(spans, window)
    for which, expected in enumerate((key, value)):
        assert error(paged.cache[plan.slot_blocks, which, :, plan.slot_offsets], expected) < TOLERANCE[dtype]
    assert (~paged.pool.isnan()).sum() == written + len(lengths) * 2 * kv_heads * dim, (
        "nothing else was written"
    )
    expected = attention.paged_attention(query.to(dtype).double(), paged.cache.double(), plan, dim**-0.5)
    assert actual.isfinite().all()
    assert (actual[-1] == 0).all()
    assert not arrivals.any(), "ready for the next call"
    assert error(actual[:-1], expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("rows", "heads", "dim", "max_tokens", "plan"),
    [
        (1, 32, 128, 8192, (8, 1)),
        (1, 32, 128, 131072, (32, 1)),
        (8, 32, 128, 8192, (8, 1)),
        (16, 32, 128, 8192, (4, 1)),
        (64, 32, 128, 8192, (1, 1)),
        (256, 32, 128, 131072, (1, 1)),
        (256, 256, 128, 8192, (1, 2)),
        (256, 512, 128, 8192, (1, 4)),
    ],
)
def test_shares_and_warps_of_a_batch(rows, heads, dim, max_tokens, plan):
    from diptych.kernels.decode_attention_triton import DecodePlan
    from diptych.kernels.rope_triton import HeadLayout

    layout = HeadLayout(heads, 8, dim, 1e-5)
    chosen = DecodePlan.choose(rows, layout, 2, num_sms=132, max_tokens=max_tokens)
    assert (chosen.shares, chosen.num_warps) == plan
    shares_of_fp8 = DecodePlan.choose(rows, layout, 1, num_sms=132, max_tokens=max_tokens).shares
    assert shares_of_fp8 == (2 * plan[0] if 1 < plan[0] < 8 or rows == 64 else plan[0])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[:2], (4, 2, 256, 32)])
@pytest.mark.parametrize("window", [None, 40])
def test_prefill_attention(dtype, shape, window):
    from diptych.kernels.prefill_attention_triton import PrefillPlan, prefill_attention

    heads, kv_heads, dim, block = shape
    lengths, starts = [130, 5, 64, 201], [0, 4, 0, 77]
    paged = Paged(lengths, heads, kv_heads, dim, dtype, block)
    paged.fill(lengths)
    spans = [(index, start, stop) for index, (start, stop) in enumerate(zip(starts, lengths, strict=True))]
    counts = [stop - start for _, start, stop in spans]
    query = draw(sum(counts), heads, dim, dtype=dtype)
    out = torch.full_like(query, torch.nan)
    prefill_attention(
        query,
        paged.cache,
        PrefillPlan.of(np.cumsum([0, *counts]).astype(np.int32), np.array(starts, np.int32), DEVICE),
        slots=paged.ints(np.repeat(paged.slots, counts).tolist()),
        tables=paged.tables,
        scale=dim**-0.5,
        window=window,
        out=out,
    )
    expected = attention.paged_attention(
        query.double(), paged.cache.double(), paged.plan(spans, window), dim**-0.5
    )
    assert error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_bias", "with_norm"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "splits"), [(4, 2, 64, 1), (9, 3, 96, 2), (20, 4, 32, 1)]
)
def test_rope_append(dtype, with_bias, with_norm, heads, kv_heads, dim, splits):
    from diptych.kernels.rope_triton import rope_append

    lengths = [40, 1, 17]
    paged = Paged(lengths, heads, kv_heads, dim, dtype)
    positions = [length - 1 for length in lengths]
    given = Heads(4, paged, splits, with_bias=with_bias, with_norm=with_norm)
    own = torch.full((2, 4, kv_heads, dim), torch.nan, device=DEVICE, dtype=dtype)
    query = rope_append(
        given.parts,
        given.inputs,
        positions=paged.ints([*positions, -1]),
        slots=paged.ints([*paged.slots, -1]),
        tables=paged.tables,
        cache=paged.cache,
        dtype=dtype,
        own=own,
    )
    q, k, v = given.split(positions)
    assert error(query[:3], q) < TOLERANCE[dtype]
    plan = paged.plan([(index, position, position + 1) for index, position in enumerate(positions)])
    for which, expected in enumerate((k, v)):
        appended = paged.cache[plan.slot_blocks, which, :, plan.slot_offsets]
        assert error(appended, expected) < TOLERANCE[dtype]
        assert torch.equal(appended, own[which, :3])
    assert (~paged.pool.isnan()).sum() == 3 * 2 * kv_heads * dim, "nothing else was written"


@pytest.mark.skipif(not (ON_GPU and is_installed()), reason="flashinfer is not installed")
@pytest.mark.parametrize("window", [None, 24])
def test_flashinfer_attends_to_whole_contexts_without_a_cache(window):
    lengths = np.array([70, 1, 300], np.int32)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    query = draw(starts[-1], 8, 64, dtype=torch.bfloat16)
    own = draw(2, starts[-1], 2, 64, dtype=torch.bfloat16)
    shape = AttentionShape(8, 2, 64, 16, 64**-0.5, window, torch.bfloat16, torch.bfloat16)
    prefill = FlashInferPrefill(shape, workspace(DEVICE))
    blocks = [[0] * -(-int(length) // 16) for length in lengths]
    assert prefill.plan(starts, PagedContext.of(blocks, lengths, 16))
    out = torch.full_like(query, torch.nan)
    prefill.run(query, own, out)
    for start, stop in itertools.pairwise(starts.tolist()):
        q, k, v = (rows[start:stop].double().transpose(0, 1) for rows in (query, *own))
        position = torch.arange(stop - start, device=DEVICE)
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (distance < (window or 2**30))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, enable_gqa=True
        ).transpose(0, 1)
        assert error(out[start:stop], expected) < TOLERANCE[torch.bfloat16]
