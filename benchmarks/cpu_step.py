"""Speed of the CPU step on the shape of SmolLM2-135M with random weights, beside what the machine could do.

The floors are measured in the same run: reading memory, and a bf16 product by torch. A decode step cannot be
faster than reading its weights and K/V, a prefill not faster than its multiplications. Times are the 10th
percentile, as on a shared machine the rest says more about the neighbours; the load average is in the result.

    python benchmarks/cpu_step.py [--output benchmarks/results/cpu_step.json]
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diptych.kernels.cpu_step import CpuStep, StepShape, isa

SHAPE = StepShape(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    tokens_per_block=32,
    rms_norm_eps=1e-5,
)
CONTEXT = 256
DECODE_BATCHES = (1, 8, 32)
PREFILLS = (128, 512, 2048)
THREADS = (1, 2)
MAX_POSITIONS = 2048
BUDGET_S = 4.0  # of one measurement


@dataclass(frozen=True, slots=True)
class Floor:
    """What the machine gives to so many threads."""

    read_bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True, slots=True)
class Row:
    threads: int
    phase: str
    rows: int
    ms: float
    tokens_per_s: float
    floor_ms: float
    of_floor: float


def percentile_10(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    call()
    times: list[float] = []
    end = time.perf_counter() + BUDGET_S
    while len(times) < 5 or (len(times) < 40 and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 10]


def measure_floor(threads: int) -> Floor:
    torch.set_num_threads(threads)
    memory = torch.ones(64 << 20, dtype=torch.float32)
    read = memory.nbytes / percentile_10(memory.sum)
    product = max(measure_product(size) for size in (1024, 2048))
    torch.set_num_threads(1)
    return Floor(read, product)


def measure_product(size: int) -> float:
    left, right = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
    return 2 * size**3 / percentile_10(lambda: left @ right)


def layer_parameters() -> int:
    qkv = (SHAPE.num_heads + 2 * SHAPE.num_kv_heads) * SHAPE.head_dim
    per_layer = qkv + SHAPE.num_heads * SHAPE.head_dim + 3 * SHAPE.intermediate_size
    return SHAPE.num_layers * per_layer * SHAPE.hidden_size


def floor_seconds(floor: Floor, rows: int, context: int, *, logits: int) -> float:
    """The larger of reading weights and earlier K/V, and multiplying, of `rows` rows."""
    head = SHAPE.vocab_size * SHAPE.hidden_size
    is_decode = logits == rows
    kv_bytes = 4 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * context * rows * is_decode
    mean_context = context if is_decode else rows / 2
    attention = 4 * SHAPE.num_layers * SHAPE.num_heads * SHAPE.head_dim * mean_context * rows
    flop = 2 * (layer_parameters() * rows + head * logits) + attention
    bytes_read = 2 * (layer_parameters() + head) + kv_bytes
    return max(bytes_read / floor.read_bytes_per_s, flop / floor.flop_per_s)


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return values.mul_(columns**-0.5).bfloat16()

    qkv = (SHAPE.num_heads + 2 * SHAPE.num_kv_heads) * SHAPE.head_dim
    weights = {
        "embed_tokens": matrix(SHAPE.vocab_size, SHAPE.hidden_size),
        "norm": torch.ones(SHAPE.hidden_size),
    }
    weights["lm_head"] = weights["embed_tokens"]
    for layer in range(SHAPE.num_layers):
        weights |= {
            f"layers.{layer}.input_norm": torch.ones(SHAPE.hidden_size),
            f"layers.{layer}.post_norm": torch.ones(SHAPE.hidden_size),
            f"layers.{layer}.qkv": matrix(qkv, SHAPE.hidden_size),
            f"layers.{layer}.o": matrix(SHAPE.hidden_size, SHAPE.num_heads * SHAPE.head_dim),
            f"layers.{layer}.gate_up": matrix(2 * SHAPE.intermediate_size, SHAPE.hidden_size),
            f"layers.{layer}.down": matrix(SHAPE.hidden_size, SHAPE.intermediate_size),
        }
    return weights


def random_pool(num_blocks: int) -> torch.Tensor:
    tile = (2, SHAPE.num_kv_heads, SHAPE.tokens_per_block, SHAPE.head_dim)
    pool = torch.empty(num_blocks, SHAPE.num_layers, *tile, dtype=torch.bfloat16)
    pool.normal_(generator=torch.Generator().manual_seed(1))
    return pool


def ints(values: object) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.asarray(values, dtype=np.int32)


def decode_call(step: CpuStep, batch: int) -> Callable[[], torch.Tensor]:
    per_sequence = CONTEXT // SHAPE.tokens_per_block
    tables = ints(np.arange(batch * per_sequence).reshape(batch, per_sequence))
    rows, positions = ints(np.arange(batch)), ints([CONTEXT - 1] * batch)
    return lambda: step.forward(rows, positions, rows, tables, rows)


def prefill_call(step: CpuStep, tokens: int) -> Callable[[], torch.Tensor]:
    tables = ints(np.arange(tokens // SHAPE.tokens_per_block)[None])
    rows, owner = ints(np.arange(tokens)), ints(np.zeros(tokens))
    return lambda: step.forward(rows, rows, owner, tables, ints([tokens - 1]))


def measure(step: CpuStep, threads: int, floor: Floor) -> list[Row]:
    cases = [("decode", n, CONTEXT, n, decode_call(step, n)) for n in DECODE_BATCHES]
    cases += [("prefill", n, n, 1, prefill_call(step, n)) for n in PREFILLS]
    rows = []
    for phase, count, context, logits, call in cases:
        seconds = percentile_10(call)
        least = floor_seconds(floor, count, context, logits=logits)
        rows.append(Row(threads, phase, count, seconds * 1e3, count / seconds, least * 1e3, least / seconds))
        print(
            f"{threads:7d} {phase:8s} {count:5d} {seconds * 1e3:9.2f} {count / seconds:9.0f}"
            f" {least * 1e3:9.2f} {least / seconds:9.0%}"
        )
    return rows


def as_dict(row: Row) -> dict[str, object]:
    return {
        "threads": row.threads,
        "phase": row.phase,
        "rows": row.rows,
        "ms": round(row.ms, 3),
        "tokens_per_s": round(row.tokens_per_s, 1),
        "floor_ms": round(row.floor_ms, 3),
        "of_floor": round(row.of_floor, 3),
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu_step.json")
    output: Path = parser.parse_args().output
    weights, pool = random_weights(), random_pool(max(DECODE_BATCHES) * CONTEXT // SHAPE.tokens_per_block)
    angles = torch.rand(MAX_POSITIONS, SHAPE.head_dim // 2)
    result: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }
    print(f"{cpu_name()}, {isa()}, load average {os.getloadavg()[0]:.1f}")
    print("threads phase     rows        ms  tokens/s  floor ms  of floor")
    rows: list[Row] = []
    floors: dict[str, dict[str, float]] = {}
    for threads in THREADS:
        floor = measure_floor(threads)
        floors[str(threads)] = {
            "read_gb_per_s": round(floor.read_bytes_per_s / 1e9, 1),
            "bf16_gflop_per_s": round(floor.flop_per_s / 1e9, 1),
        }
        step = CpuStep(SHAPE, weights, angles.cos(), angles.sin(), threads)
        step.bind(pool)
        rows += measure(step, threads, floor)
        step.close()
    result |= {"load_after": os.getloadavg()[0], "floors": floors, "rows": [as_dict(row) for row in rows]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"floors: {floors}")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
