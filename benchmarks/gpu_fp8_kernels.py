"""Times the kernels that read FP8 over their settings, beside what they would replace, to choose the settings.

    python benchmarks/gpu_fp8_kernels.py [linear] [rows] [decode]

As gpu_kernels.py; `rows` compares products of many rows with the skinny kernel and with bfloat16.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import DECODES, DEVICE, WEIGHTS, DecodeCase, report, time_us
from torch import Tensor

from diptych.kernels.fp8_linear_triton import fp8_linear, quantize_rows
from diptych.kernels.gpu import num_multiprocessors
from diptych.kernels.skinny_linear_triton import (
    FP8_GATED,
    SkinnyPlan,
    choose_fp8,
    skinny_gated,
    skinny_linear,
)
from diptych.worker.models.fp8_weights import FP8
from diptych.worker.models.fp8_weights import quantize_rows as quantize_weight

SHAPES = {name: shape for name, shape in WEIGHTS.items() if name.startswith("8b") and name != "8b head"}
SHAPES["8b gate and up"] = SHAPES["8b gate_up"]  # without the gate
SINGLE = ((4, 1024), (8, 512), (8, 1024), (16, 512), (16, 256))
SEVERAL = ((64, 128, 4), (64, 256, 4), (128, 128, 4), (128, 128, 8))


class Weights:
    """So many of one shape that the L2 cache holds none of them when it is needed again."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.outputs, self.inputs = outputs, inputs
        count = max(2, min(24, int(6e8 / (outputs * inputs))))
        self.plain = [torch.randn(outputs, inputs, device=DEVICE).bfloat16() for _ in range(count)]
        self.narrow = [quantize_weight(weight) for weight in self.plain]

    def rows(self, count: int) -> Tensor:
        return torch.randn(count, self.inputs, device=DEVICE).bfloat16()


def plans(rows: int, inputs: int) -> Iterator[SkinnyPlan]:
    if rows == 1:
        for block_n, block_k in SINGLE:
            yield SkinnyPlan(block_n, block_k, stages=3)
        return
    for (block_n, block_k, warps), splits in itertools.product(SEVERAL, (1, 2, 4, 8)):
        if inputs >= splits * block_k:
            yield SkinnyPlan.tiled(rows, inputs, block_n, block_k, splits, num_warps=warps, weight_bytes=1)


def measure_linear() -> None:
    sms = num_multiprocessors(DEVICE)
    for name, (outputs, inputs) in SHAPES.items():
        weights = Weights(outputs, inputs)
        for rows in (1, 8, 32, 64):
            x = weights.rows(rows)
            is_gated = rows == 1 and name.endswith("gate_up")
            product = skinny_gated if is_gated else skinny_linear
            chosen = FP8_GATED if is_gated else choose_fp8(rows, outputs, inputs, sms)
            times: dict[object, float] = {}
            for plan in {chosen, *plans(rows, inputs)}:
                times[plan] = time_us([partial(product, x, w, plan, s) for w, s in weights.narrow])
            others = {"in fp8": time_us([partial(fp8_linear, x, *pair) for pair in weights.narrow])}
            report(f"fp8 {name}, {rows} rows", outputs * inputs, chosen, times, others)


def measure_rows() -> None:
    for name, (outputs, inputs) in SHAPES.items():
        weights = Weights(outputs, inputs)
        for rows in (32, 128, 256, 8192):
            x = weights.rows(rows)
            narrow, scales = quantize_rows(x)
            product: Any = partial(torch._scaled_mm, narrow, scale_a=scales, out_dtype=torch.bfloat16)
            cases: dict[str, list[Callable[[], object]]] = {
                "fp8": [partial(fp8_linear, x, *pair) for pair in weights.narrow],
                "its product alone": [partial(product, w.T, scale_b=s[None]) for w, s in weights.narrow],
                "summed in fewer digits": [
                    partial(product, w.T, scale_b=s[None], use_fast_accum=True) for w, s in weights.narrow
                ],
                "bfloat16": [partial(F.linear, x, weight) for weight in weights.plain],
            }
            shown = "; ".join(f"{what} {time_us(calls):.1f} us" for what, calls in cases.items())
            weight, scale = weights.narrow[0]
            exact = (narrow[:32].double() * scales[:32]) @ (weight.double() * scale[:, None]).T
            away = [
                float(
                    (product(weight.T, scale_b=scale[None], use_fast_accum=fast)[:32] - exact).norm()
                    / exact.norm()
                )
                for fast in (False, True)
            ]
            print(f"{name}, {rows} rows: {shown}; {away[0]:.1e} and {away[1]:.1e} away", flush=True)


def measure_decode() -> None:
    for case in DECODES[:5]:
        DecodeCase(*case, dtype=FP8).measure()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.manual_seed(0)
    parts = {"linear": measure_linear, "rows": measure_rows, "decode": measure_decode}
    for part in sys.argv[1:] or parts:
        parts[part]()
