"""Decode and prefill of the GPU engine on random weights: the graph alone, and the whole engine without HTTP.

    python benchmarks/gpu_step.py [--shape 8b --shape 135m] [--quant none --quant fp8] [--kv auto --kv fp8]
                                  [--triton] [--output FILE.json]

A decode step is timed three ways: replays of its graph, the engine's step loop (scheduler, sampling, overlap, events)
in wall time, and the floor: the bytes of weights and KV that it must read over what the memory gives in a copy.
Prefill is also given as a fraction of the rate of one large bfloat16 product. Copy and product are measured first:
machines of one kind differ by a few percent.

Figures are medians; `spread` is the 10th and 90th percentile. Graphs are replayed one after the other, as a worker
does: a sample is the mean of eight. A mixed step, decodes and a prompt, is timed from its launch to its tokens.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu.engine_loop import decode_step_ms, prefill_tokens_per_s

from diptych.kernels.flashinfer_attention import AttentionShape
from diptych.wire import SamplingParams, Submit
from diptych.worker.cuda_runner import CudaRunner
from diptych.worker.device_state import DeviceState
from diptych.worker.graphs import DecodeGraphs
from diptych.worker.mixed_graphs import MAX_ROWS, MixedGraphs, mixed_sizes
from diptych.worker.models.config import ModelConfig, RopeConfig
from diptych.worker.models.cuda_network import CudaNetwork
from diptych.worker.models.quantization import Quantization
from diptych.worker.models.weights import DTYPES, dummy_weights
from diptych.worker.plan import Chunk, StepPlan
from diptych.worker.prefill import TritonPrefill, choose_prefill
from diptych.worker.sampler import Sampler
from diptych.worker.sequence import Sequence

BLOCK = 32
_RUNS = 8
_STEPS = 64
_GROWTH = 10 + _STEPS // 2  # of contexts from the first steps, which do not count, to the middle one
MIXED = ((0, 64), (16, 64), (64, 128), (64, 448))  # decodes, and tokens of one prompt beside them
_MIXED_CONTEXT = 1088  # of the decodes
_MIXED_SLOTS = 256  # sequences that the engine may run: so many rows may draw


@dataclass(frozen=True)
class Shape:
    config: ModelConfig
    decodes: tuple[tuple[int, int], ...]  # rows, context


def shape_of(name: str, quantization: Quantization | None = None) -> Shape:
    common: dict[str, Any] = {
        "family": "llama",
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(theta=500000.0),
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
        "quantization": quantization or Quantization(),
    }
    if name == "8b":
        config = ModelConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
            num_kv_heads=8, head_dim=128, tie_word_embeddings=False, **common,
        )  # fmt: skip
    else:
        config = ModelConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
            num_kv_heads=3, head_dim=64, tie_word_embeddings=True, **common,
        )  # fmt: skip
    return Shape(config, ((1, 256), (8, 1088), (64, 1088), (256, 1088)))


@dataclass
class Results:
    device: str
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    output: Path | None = None

    def add(self, **case: Any) -> None:
        self.cases.append(case)
        print(
            " ".join(f"{key}={round(v, 4) if isinstance(v, float) else v}" for key, v in case.items()),
            flush=True,
        )
        if self.output is not None:
            found = {name: value for name, value in dataclasses.asdict(self).items() if name != "output"}
            self.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def percentiles(values: list[float]) -> tuple[float, list[float]]:
    ordered = sorted(values)
    return statistics.median(ordered), [ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]]


def event_times_ms(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of one `run` among _RUNS that are queued together, `count` times."""
    times = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_RUNS):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / _RUNS)
    return times[count // 4 :]


def layer_weights(config: ModelConfig) -> int:
    """What each token of a prompt is multiplied with."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def measure_limits() -> dict[str, float]:
    """What the memory gives in a copy, read and written, and the matrix unit on random numbers, both for 0.3 s."""
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    x, y = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy_ms, product_ms = (
        statistics.median(event_times_ms(run, count))
        for run, count in ((lambda: target.copy_(source), 20), (lambda: torch.mm(x, y), 28))
    )
    return {"copy_tb_s": 2 * source.nbytes / copy_ms / 1e9, "product_tflop_s": 2 * 8192**3 / product_ms / 1e9}


class Machine:
    """A network of one shape over a pool that fits all its cases."""

    def __init__(self, shape: Shape, *, flashinfer: bool) -> None:
        self.shape, config = shape, shape.config
        self.device = torch.device("cuda", 0)
        weights = dummy_weights(config, device=self.device, keep_fp8=True)
        self.network = CudaNetwork(config, weights, self.device, 8192)
        per_row = -(-(max(context for _, context in shape.decodes) + 256) // BLOCK)
        self.blocks_per_row = max(per_row, 2304 // BLOCK)
        self.num_blocks = max(rows for rows, _ in shape.decodes) * per_row + 8
        self.pool = torch.empty(
            self.num_blocks, config.num_layers, 2, config.num_kv_heads, BLOCK, config.head_dim,
            dtype=DTYPES[config.kv_dtype], device=self.device,
        )  # fmt: skip
        for part in self.pool.split(256):
            part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=self.device))
        self.attention = AttentionShape(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            BLOCK,
            config.head_dim**-0.5,
            None,
            torch.bfloat16,
            self.pool.dtype,
        )
        self.prefill = (choose_prefill if flashinfer else TritonPrefill)(self.attention, self.device)

    def floor_ms(self, rows: int, context: int, copy_tb_s: float) -> float:
        config = self.shape.config
        per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * self.pool.itemsize
        return (self.network.weight_bytes + rows * context * per_token) / copy_tb_s / 1e9


def measure_graph(machine: Machine, name: str, rows: int, context: int, results: Results) -> None:
    state = DeviceState(rows, machine.blocks_per_row, machine.device)
    graphs = DecodeGraphs(machine.network, state, machine.pool, [rows])
    blocks = torch.randperm(machine.num_blocks, device=machine.device).int()
    per_row = -(-context // BLOCK)
    state.tables[:, :per_row] = blocks[: rows * per_row].view(rows, per_row)
    started = time.perf_counter()
    graphs.capture(lambda fraction: None)
    captured_s = time.perf_counter() - started
    state.rows.copy_(torch.arange(rows))
    state.field("tokens").copy_(torch.randint(0, 40000, (rows,)))

    def step(*, sampled: bool) -> None:
        state.field("positions").fill_(context - 1)
        graphs.replay(rows, sampled=sampled)

    count = 16
    greedy, spread = percentiles(event_times_ms(lambda: step(sampled=False), count))
    floor = machine.floor_ms(rows, context, results.limits["copy_tb_s"])
    state.field("temperature").fill_(0.8)
    state.field("top_p").fill_(1.0)
    plain, _ = percentiles(event_times_ms(lambda: step(sampled=True), 8))
    state.field("top_p").fill_(0.9)
    nucleus, _ = percentiles(event_times_ms(lambda: step(sampled=True), 8))
    runner = CudaRunner(machine.network, machine.pool, state, machine.prefill, graphs, Sampler(frozenset()))
    wall: dict[str, float] = {}
    state.rows.fill_(-1)
    for kind, settings in (("engine_ms", {"overlap": True}), ("engine_no_overlap_ms", {"overlap": False})):
        times = decode_step_ms(
            runner, machine.num_blocks, BLOCK, rows, context - _GROWTH, steps=_STEPS, **settings
        )
        wall[kind], wall[kind + "_p90"] = statistics.median(times), sorted(times)[len(times) * 9 // 10]
        state.rows.fill_(-1)
        runner = CudaRunner(
            machine.network, machine.pool, state, machine.prefill, graphs, Sampler(frozenset())
        )
    results.add(
        what="decode", shape=name, rows=rows, context=context, ms=greedy, spread=spread, floor_ms=floor,
        of_floor=floor / greedy, temperature_ms=plain, top_p_ms=nucleus, capture_s=captured_s, **wall,
    )  # fmt: skip


def measure_mixed(machine: Machine, name: str, rows: int, tokens: int, results: Results) -> None:
    state = DeviceState(_MIXED_SLOTS, machine.blocks_per_row, machine.device)
    size = next(size for size in mixed_sizes(MAX_ROWS) if size >= rows + tokens)
    mixed = MixedGraphs(machine.network, state, machine.pool, [size])
    started = time.perf_counter()
    mixed.capture(lambda fraction: None)
    captured_s = time.perf_counter() - started
    blocks = iter(torch.randperm(machine.num_blocks).tolist())

    def chunk(index: int, start: int, count: int) -> Chunk:
        length = start + count
        params = SamplingParams(max_tokens=1, temperature=0.0)
        prompt = torch.randint(0, 40000, (length,)).tolist()
        sequence = Sequence(Submit(request_id=str(index), prompt_token_ids=prompt, params=params), 0.0)
        sequence.blocks = [next(blocks) for _ in range(-(-length // BLOCK))]
        return Chunk(sequence, start, count, draws=True)

    plan = StepPlan([*(chunk(row, _MIXED_CONTEXT - 1, 1) for row in range(rows)), chunk(rows, 0, tokens)])
    times: dict[str, float] = {}
    for kind, graphs in (("ms", mixed), ("without_graph_ms", None)):
        runner = CudaRunner(
            machine.network, machine.pool, state, machine.prefill, None, Sampler(frozenset()), graphs
        )
        samples = []
        for _ in range(24):
            started = time.perf_counter()
            runner.collect(runner.launch(plan))
            samples.append((time.perf_counter() - started) * 1e3)
        times[kind], times[kind + "_p90"] = statistics.median(samples[4:]), sorted(samples[4:])[18]
        if graphs is not None:
            times["graph_ms"], _ = percentiles(event_times_ms(lambda: mixed.replay(size, sampled=False), 16))
    results.add(
        what="mixed", shape=name, decodes=rows, context=_MIXED_CONTEXT, prompt=tokens, padded=size,
        capture_s=captured_s, **times,
    )  # fmt: skip


def measure_prefill(
    machine: Machine, name: str, results: Results, rows: int = 32, length: int = 2048
) -> None:
    state = DeviceState(rows, machine.blocks_per_row, machine.device)
    runner = CudaRunner(machine.network, machine.pool, state, machine.prefill, None, Sampler(frozenset()))
    rates = []
    for _ in range(5):
        rates.append(prefill_tokens_per_s(runner, machine.num_blocks, BLOCK, rows, length))
    rate = statistics.median(rates[1:])
    results.add(
        what="prefill",
        shape=name,
        rows=rows,
        length=length,
        attention=machine.prefill.name,
        tokens_per_s=rate,
        of_product=2e-12 * rate * layer_weights(machine.shape.config) / results.limits["product_tflop_s"],
        first=rates[0],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", action="append", choices=["8b", "135m"])
    parser.add_argument("--quant", action="append", choices=["none", "fp8"], help="of the weights")
    parser.add_argument("--kv", action="append", choices=["auto", "fp8"], help="of the KV cache")
    parser.add_argument("--triton", action="store_true", help="prompts without flashinfer")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = Results(torch.cuda.get_device_name(), output=arguments.output)
    results.versions = {
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
    }
    torch.manual_seed(0)
    results.limits = measure_limits()
    print(" ".join(f"{name}={value:.4g}" for name, value in results.limits.items()), flush=True)
    with torch.inference_mode():
        cases = arguments.shape or ["8b", "135m"], arguments.quant or ["none"], arguments.kv or ["auto"]
        for name, quant, kv in itertools.product(*cases):
            quantization = Quantization("fp8" if quant == "fp8" else "plain", fp8_kv=kv == "fp8")
            machine = Machine(shape_of(name, quantization), flashinfer=not arguments.triton)
            label = name + " fp8" * (quant == "fp8") + " fp8-kv" * (kv == "fp8")
            for rows, context in machine.shape.decodes:
                measure_graph(machine, label, rows, context, results)
            for rows, tokens in MIXED:
                measure_mixed(machine, label, rows, tokens, results)
            measure_prefill(machine, label, results)
            del machine
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
