"""What each choice of the GPU engine is worth: one decode step's graph with the choice and without it.

    python benchmarks/gpu_variants.py [--rows 1,64,256] [--output FILE.json]

Each line is a step of the 8B shape with one thing changed; `as it is` is timed first and last, whose difference is
the noise. Times are medians of replays.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_step import BLOCK, Machine, event_times_ms, percentiles, shape_of

from diptych.kernels import (
    activation_triton,
    batch_state_triton,
    decode_attention_triton,
    norm_triton,
    nucleus_triton,
    rope_triton,
    sampling_triton,
    skinny_linear_triton,
)
from diptych.kernels.decode_attention_triton import DecodePlan
from diptych.kernels.skinny_linear_triton import MAX_ROWS, SkinnyPlan
from diptych.worker.device_state import DeviceState
from diptych.worker.graphs import DecodeGraphs
from diptych.worker.models import cuda_network
from diptych.worker.models.cuda_network import PartsLinear

_OUTPUTS = (6144, 4096, 28672, 128256)  # of the shape's weights
CONTEXTS = {1: 256, 8: 1088, 64: 1088, 256: 1088}
_MODULES = (
    activation_triton,
    batch_state_triton,
    decode_attention_triton,
    norm_triton,
    nucleus_triton,
    rope_triton,
    sampling_triton,
    skinny_linear_triton,
)


@dataclass(frozen=True)
class Variant:
    name: str
    patches: tuple[Any, ...] = ()


def no_dependent_launch() -> Variant:
    def plain(device: torch.device) -> dict[str, Any]:
        return {"PDL": False}

    return Variant("kernels wait to be launched", tuple(patch.object(m, "chained", plain) for m in _MODULES))


def products(name: str, **fields: Any) -> Variant:
    """All skinny products with another plan."""
    plain, gated = cuda_network.choose, cuda_network.choose_gated

    def other(plan: SkinnyPlan | None) -> SkinnyPlan | None:
        return plan and dataclasses.replace(plan, **fields)

    return Variant(
        f"products: {name}",
        (
            patch.object(cuda_network, "choose", lambda *a: other(plain(*a))),
            patch.object(cuda_network, "choose_gated", lambda *a: other(gated(*a))),
        ),
    )


def gate_apart() -> Variant:
    no_plan = patch.object(cuda_network, "choose_gated", lambda *a: None)
    return Variant("gate and up in a kernel of their own", (no_plan,))


def cublas_for(*outputs: int) -> Variant:
    """The products with so many outputs go through cuBLAS."""
    is_skinny = PartsLinear.is_skinny

    def other(linear: PartsLinear, rows: int) -> bool:
        return len(linear.weight) not in outputs and is_skinny(linear, rows)

    name = f"cuBLAS for {' '.join(map(str, outputs))} outputs"
    return Variant(name, (patch.object(PartsLinear, "is_skinny", other),))


def attention(*values: int) -> Variant:
    plan = DecodePlan(*values)
    return Variant(f"attention {values}", (patch.object(DecodePlan, "choose", lambda *a: plan),))


# Shares, tile, stages, warps.
_ATTENTION = {
    1: ((8, 32, 2, 2), (8, 32, 3, 2), (16, 32, 2, 1)),
    8: ((4, 32, 2, 1), (8, 64, 3, 2), (16, 32, 2, 1)),
    64: ((1, 32, 2, 2), (1, 64, 3, 2), (2, 32, 2, 1)),
    256: ((1, 32, 3, 1), (1, 32, 2, 2), (1, 64, 3, 2)),
}


def variants(rows: int) -> Iterator[Variant]:
    yield Variant("as it is")
    yield no_dependent_launch()
    if rows <= MAX_ROWS:
        yield gate_apart()
        yield cublas_for(*_OUTPUTS)
        for outputs in _OUTPUTS:
            yield cublas_for(outputs)
    if rows == 1:
        yield products("4 stages", stages=4)
        yield products("8 rows, 512 columns", block_n=8, block_k=512)
    elif rows <= MAX_ROWS:
        yield products("64 columns", block_k=64)
        yield products("2 stages", stages=2)
    for form in _ATTENTION[rows]:
        yield attention(*form)
    yield Variant("as it is, again")


def step_ms(machine: Machine, rows: int) -> tuple[float, list[float]]:
    context = CONTEXTS[rows]
    state = DeviceState(rows, machine.blocks_per_row, machine.device)
    graphs = DecodeGraphs(machine.network, state, machine.pool, [rows])
    per_row = -(-context // BLOCK)
    blocks = torch.randperm(machine.num_blocks, device=machine.device).int()
    state.tables[:, :per_row] = blocks[: rows * per_row].view(rows, per_row)
    state.rows.copy_(torch.arange(rows))
    state.field("tokens").copy_(torch.randint(0, 40000, (rows,)))
    state.field("positions").fill_(context - 1)
    graphs.capture(lambda fraction: None)

    def step() -> None:
        state.field("positions").fill_(context - 1)
        graphs.replay(rows, sampled=False)

    return percentiles(event_times_ms(step, 8))


def measure(machine: Machine, rows: int, report: Callable[[dict[str, Any]], None]) -> None:
    for variant in variants(rows):
        began = time.perf_counter()
        case: dict[str, Any] = {"rows": rows, "context": CONTEXTS[rows], "variant": variant.name}
        try:
            with ExitStack() as stack:
                for change in variant.patches:
                    stack.enter_context(change)
                case["ms"], case["spread"] = step_ms(machine, rows)
        except Exception as error:  # one that does not compile says so, and the next is tried
            case["error"] = f"{type(error).__name__}: {error}"[:200]
        case["took_s"] = time.perf_counter() - began
        report(case)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,8,64,256", metavar="N[,N...]")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cases: list[dict[str, Any]] = []

    def report(case: dict[str, Any]) -> None:
        cases.append(case)
        shown = case.get("error") or f"{case['ms']:.3f} ms {case['spread']}"
        print(f"{case['rows']:4d} {case['variant']:40s} {shown} ({case['took_s']:.1f} s)", flush=True)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(cases, indent=1) + "\n")

    with torch.inference_mode():
        torch.manual_seed(0)
        machine = Machine(shape_of("8b"), flashinfer=False)
        for rows in arguments.rows.split(","):
            measure(machine, int(rows), report)


if __name__ == "__main__":
    main()
