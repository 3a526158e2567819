"""Times single kernels of the GPU engine over their settings, beside cuBLAS and flashinfer, to choose the settings.

    python benchmarks/gpu_kernels.py [linear] [gated] [decode] [prefill]

Every timed call reads another weight or another layer's cache, so that the L2 cache serves nothing. One line for each
case: what the engine chooses, then the fastest settings tried.
"""

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from gpu.flashinfer_decode import FlashInferDecode
from torch import Tensor

from diptych.kernels import flashinfer_attention as flashinfer
from diptych.kernels.activation_triton import silu_and_mul
from diptych.kernels.decode_attention_triton import DecodePlan, decode_attention
from diptych.kernels.gated_linear_triton import gated_linear, pays
from diptych.kernels.gpu import num_multiprocessors
from diptych.kernels.prefill_attention_triton import PrefillPlan, prefill_attention
from diptych.kernels.rope_triton import HeadInputs, HeadLayout
from diptych.kernels.skinny_linear_triton import (
    SkinnyPlan,
    choose,
    choose_gated,
    skinny_gated,
    skinny_linear,
)

DEVICE = torch.device("cuda", 0)
BLOCK = 32
WEIGHTS = {
    "8b qkv": (6144, 4096),
    "8b o": (4096, 4096),
    "8b gate_up": (28672, 4096),
    "8b down": (4096, 14336),
    "8b head": (128256, 4096),
    "135m qkv": (960, 576),
    "135m o": (576, 576),
    "135m gate_up": (3072, 576),
    "135m down": (576, 1536),
}
DECODES = (
    (32, 8, 128, 1, 256),
    (32, 8, 128, 1, 8192),
    (32, 8, 128, 8, 1088),
    (32, 8, 128, 64, 1088),
    (32, 8, 128, 256, 1088),
    (9, 3, 64, 1, 256),
    (9, 3, 64, 64, 1088),
    (9, 3, 64, 256, 1088),
)
DECODE_FORMS = (
    (16, 2, 1),
    (16, 3, 1),
    (32, 2, 1),
    (32, 3, 1),
    (32, 2, 2),
    (32, 3, 2),
    (64, 3, 2),
    (64, 3, 4),
)  # tile, stages, warps
DECODE_SHARES = {1: (8, 16), 8: (2, 4, 8), 64: (1, 2), 256: (1,)}


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The calls one after the other, compiled before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one of the calls, all in one CUDA graph."""
    graph = captured(calls)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:]) * 1e3 / len(calls)


def report(
    name: str, num_bytes: int, chosen: object, times: dict[object, float], others: dict[str, float]
) -> None:
    best = sorted(times, key=times.__getitem__)[:4]
    shown = [f"{us:.1f} us ({num_bytes / us / 1e6:.2f} TB/s) {other}" for other, us in others.items()]
    shown += [f"{times[chosen]:.1f} chosen {chosen}", *(f"{times[plan]:.1f} {plan}" for plan in best)]
    print(f"{name}: {'; '.join(shown)}", flush=True)


def linear_plans(rows: int, inputs: int, *, gated: bool) -> Iterator[SkinnyPlan]:
    if rows == 1:
        for block_n, block_k, stages in itertools.product((4, 8, 16), (512, 1024), (3, 4)):
            yield SkinnyPlan(block_n, block_k, stages=stages)
        return
    forms = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8))
    for (block_n, block_k, warps), splits in itertools.product(forms, (1,) if gated else (1, 2, 4)):
        if inputs >= 2 * splits * block_k:
            plan = SkinnyPlan.tiled(rows, inputs, block_n, block_k, splits, num_warps=warps, gated=gated)
            yield plan
            yield dataclasses.replace(plan, stages=max(2, plan.stages // 2))


def measure_linear() -> None:
    sms = num_multiprocessors(DEVICE)
    for name, (outputs, inputs) in WEIGHTS.items():
        num_bytes = outputs * inputs * 2
        count = max(2, min(24, int(6e8 / num_bytes)))
        weights = [torch.randn(outputs, inputs, device=DEVICE).bfloat16() for _ in range(count)]
        for rows in (1, 8, 64):
            x = torch.randn(rows, inputs, device=DEVICE).bfloat16()
            times: dict[object, float] = {}
            chosen = choose(rows, outputs, inputs, sms)
            product = skinny_linear
            gated = choose_gated(rows, outputs // 2, inputs, sms) if name.endswith("gate_up") else None
            if gated is not None:
                chosen, product = gated, skinny_gated
            cublas = time_us([partial(F.linear, x, weight) for weight in weights])
            for plan in {chosen, *linear_plans(rows, inputs, gated=gated is not None)}:
                times[plan] = time_us([partial(product, x, weight, plan) for weight in weights])
            report(f"linear {name}, {rows} rows", num_bytes, chosen, times, {"cublas": cublas})


def measure_gated() -> None:
    """Gate and up of many rows: one kernel beside cuBLAS and a gate apart."""
    sms = num_multiprocessors(DEVICE)
    for name, (outputs, inputs) in WEIGHTS.items():
        if not name.endswith("gate_up"):
            continue
        count = max(2, min(24, int(5e8 / (outputs * inputs * 2))))
        weights = [torch.randn(outputs, inputs, device=DEVICE).bfloat16() for _ in range(count)]
        for rows in (128, 256, 512, 1024, 2048, 8192):
            x = torch.randn(rows, inputs, device=DEVICE).bfloat16()
            apart = time_us([partial(gate_apart, x, weight) for weight in weights])
            together = time_us([partial(gated_linear, x, weight, sms) for weight in weights])
            chosen = "together" if pays(rows, weights[0], sms) else "apart"
            print(
                f"gated {name}, {rows} rows: apart {apart:.1f} us, together {together:.1f}, chosen {chosen}",
                flush=True,
            )


def gate_apart(x: Tensor, weight: Tensor) -> Tensor:
    return silu_and_mul(F.linear(x, weight)[None], x.dtype)


@dataclass(frozen=True)
class DecodeCase:
    heads: int
    kv_heads: int
    dim: int
    rows: int
    context: int
    dtype: torch.dtype = torch.bfloat16  # of the cache

    @property
    def num_bytes(self) -> int:
        return self.rows * self.context * 2 * self.kv_heads * self.dim * self.dtype.itemsize

    def measure(self) -> None:
        inputs = DecodeInputs(self)
        sms = num_multiprocessors(DEVICE)
        chosen = DecodePlan.choose(self.rows, inputs.layout, self.dtype.itemsize, sms, self.context)
        times: dict[object, float] = {}
        for plan in {chosen, *self._plans()}:
            times[plan] = time_us(inputs.calls(plan))
        report(str(self), self.num_bytes, chosen, times, self._flashinfer(inputs))

    def _plans(self) -> Iterator[DecodePlan]:
        for shares, (tile, stages, warps) in itertools.product(DECODE_SHARES[self.rows], DECODE_FORMS):
            if shares == 1 or self.context // shares >= tile:
                yield DecodePlan(shares, tile, stages, warps)

    def _flashinfer(self, inputs: "DecodeInputs") -> dict[str, float]:
        if self.dtype != torch.bfloat16 or not flashinfer.is_installed():
            return {}
        decode = FlashInferDecode(
            attention_shape(self.heads, self.kv_heads, self.dim),
            flashinfer.workspace(DEVICE),
            self.rows,
            inputs.tables.numel(),
        )
        lengths = np.full(self.rows, self.context, np.int32)
        decode.plan(flashinfer.PagedContext.of(inputs.tables.tolist(), lengths, BLOCK))
        calls = [partial(decode.run, inputs.query, cache, inputs.out) for cache in inputs.pool.unbind(1)]
        return {"flashinfer": time_us(calls)}


class DecodeInputs:
    """Random inputs of a case, with caches of several layers."""

    def __init__(self, case: DecodeCase) -> None:
        per_row = case.context // BLOCK
        layers = max(2, min(16, int(2e9 / case.num_bytes)))
        shape = (case.rows * per_row, layers, 2, case.kv_heads, BLOCK, case.dim)
        self.pool = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16).normal_().to(case.dtype)
        self.layout = HeadLayout(case.heads, case.kv_heads, case.dim, 1e-5)
        angles = torch.rand(2, case.context, case.dim // 2, device=DEVICE)
        heads = HeadInputs(self.layout, None, None, (angles[0].cos(), angles[1].sin()))
        width = (case.heads + 2 * case.kv_heads) * case.dim
        parts = torch.randn(1, case.rows, width, device=DEVICE).bfloat16()
        self.tables = torch.randperm(case.rows * per_row, device=DEVICE).int().view(case.rows, per_row)
        self.query = parts[0].view(case.rows, -1, case.dim)[:, : case.heads].contiguous()
        self.out = torch.empty_like(self.query)
        self._attend = partial(
            decode_attention,
            parts,
            heads,
            positions=torch.full((case.rows,), case.context - 1, dtype=torch.int32, device=DEVICE),
            slots=torch.arange(case.rows, dtype=torch.int32, device=DEVICE),
            tables=self.tables,
            scale=case.dim**-0.5,
            window=None,
            arrivals=torch.zeros(case.rows * case.kv_heads, dtype=torch.int32, device=DEVICE),
            out=self.out,
        )

    def calls(self, plan: DecodePlan) -> list[Callable[[], object]]:
        """One for each layer."""
        return [partial(self._attend, cache, plan=plan) for cache in self.pool.unbind(1)]


def attention_shape(heads: int, kv_heads: int, dim: int) -> flashinfer.AttentionShape:
    return flashinfer.AttentionShape(
        heads, kv_heads, dim, BLOCK, dim**-0.5, None, torch.bfloat16, torch.bfloat16
    )


def measure_decode() -> None:
    for case in DECODES:
        DecodeCase(*case).measure()
        torch.cuda.empty_cache()


def measure_prefill() -> None:
    """Whole prompts, and the last halves of prompts."""
    for cached in (0, 1024):
        measure_prompts(cached)


def measure_prompts(cached: int, rows: int = 4, length: int = 2048) -> None:
    heads, kv_heads, dim, count = 32, 8, 128, length - cached
    pool = torch.randn(rows * length // BLOCK, 4, 2, kv_heads, BLOCK, dim, device=DEVICE).bfloat16()
    tables = torch.randperm(len(pool), device=DEVICE).int().view(rows, -1)
    query = torch.randn(rows * count, heads, dim, device=DEVICE).bfloat16()
    starts = np.arange(rows + 1, dtype=np.int32) * count
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE).repeat_interleave(count)
    plan = PrefillPlan.of(starts, np.full(rows, cached, np.int32), DEVICE)
    expected, out = torch.empty_like(query), torch.empty_like(query)
    operations = 2 * rows * (length**2 - cached**2) * heads * dim
    name = f"prefill of {rows} x {count} after {cached}"

    def ours() -> None:
        prefill_attention(
            query, pool[:, 1], plan, slots=slots, tables=tables, scale=dim**-0.5, window=None, out=expected
        )

    us = time_us([ours])
    print(f"{name}, triton: {us:.0f} us, {operations / us / 1e6:.0f} TFLOP/s", flush=True)
    if not flashinfer.is_installed():
        return
    context = flashinfer.PagedContext.of(tables.tolist(), np.full(rows, length, np.int32), BLOCK)
    own = pool[tables.flatten(), 1].permute(1, 0, 3, 2, 4).reshape(2, rows * length, kv_heads, dim)
    for backend in ("fa2", "fa3"):
        prefill = flashinfer.FlashInferPrefill(
            attention_shape(heads, kv_heads, dim), flashinfer.workspace(DEVICE), backend
        )
        keys_values = own if prefill.plan(starts, context) else pool[:, 1]
        us = time_us([partial(prefill.run, query, keys_values, out)])
        difference = float((out - expected).float().norm() / expected.float().norm())
        print(
            f"{name}, {backend}: {us:.0f} us, {operations / us / 1e6:.0f} TFLOP/s, {difference:.0e} away",
            flush=True,
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    parts = {
        "linear": measure_linear,
        "gated": measure_gated,
        "decode": measure_decode,
        "prefill": measure_prefill,
    }
    for part in sys.argv[1:] or parts:
        parts[part]()
