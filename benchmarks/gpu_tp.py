"""Tensor parallelism on GPUs: whole engines with one and two ranks, random weights, no HTTP.

    python benchmarks/gpu_tp.py [--part collectives|tokens|speed|kill ...] [--tp 2] [--quant fp8] [--output FILE.json]

collectives   what one sum over the ranks costs inside a CUDA graph, by size and way
tokens        tokens and log probabilities of two ranks against one; KV moved between engines of one and two ranks
speed         decode and prefill of the 8B shape, in wall time at the engine's client: scheduler, broadcast and all
kill          how long after a rank's death its engine is gone, and whether its memory is free again

Figures are medians over steps; `spread` is the 10th and 90th percentile.
"""

import argparse
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from gpu.dummy_model import QUANTIZATIONS

from diptych.wire import EngineProgress, SamplingParams, Submit, TokenEvent
from diptych.worker.engine_client import EngineClient
from diptych.worker.parallel import ParallelDims
from diptych.worker.settings import EngineSettings

LIMIT_S = 240.0
SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
DECODES = ((1, 256), (64, 1088), (256, 1088))


@dataclass
class Results:
    output: Path | None
    quant: str
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    cases: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **case: Any) -> None:
        self.cases.append(case)
        print(json.dumps(case), flush=True)
        if self.output is not None:
            import torch

            device = torch.cuda.get_device_name()
            whole = {"date": self.date, "quant": self.quant, "device": device, "torch": torch.__version__}
            self.output.write_text(json.dumps({**whole, "cases": self.cases}, indent=1))


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    last: TokenEvent | None = None
    transport: str = ""


class Running:
    """One engine with its processes."""

    def __init__(self, shape: str, folder: Path, tp: int, quant: str, **settings: Any) -> None:
        path = folder / shape
        path.mkdir(exist_ok=True)
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
        config |= {"max_position_embeddings": 8192, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}
        config |= {"hidden_act": "silu", "tie_word_embeddings": False, **SHAPES[shape]}
        config |= QUANTIZATIONS[quant]
        (path / "config.json").write_text(json.dumps(config))
        self.settings = EngineSettings(
            model_path=str(path),
            incarnation=secrets.token_hex(8),
            device="cuda",
            load_format="dummy",
            dims=ParallelDims(tp_size=tp),
            num_threads=4,
            **settings,
        )

    async def __aenter__(self) -> "Running":
        self.client = EngineClient(self.settings, hang_timeout_s=LIMIT_S)
        started = time.monotonic()
        try:
            self.ready = await asyncio.wait_for(self.client.start(_show), LIMIT_S)
        except BaseException:
            await self.client.close()
            raise
        self.start_s = time.monotonic() - started
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def ask(self, prompts: list[list[int]], max_tokens: int, **settings: Any) -> list[Answer]:
        """All at once; `settings`: fields of Submit, or of its parameters."""
        answers = [Answer() for _ in prompts]
        done = [asyncio.get_running_loop().create_future() for _ in prompts]
        fields = {
            key: settings.pop(key)
            for key in ("request_type", "ticket", "output_token_ids")
            if key in settings
        }
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **{"temperature": 0.0, **settings})
        for prompt, answer, future in zip(prompts, answers, done, strict=True):

            def sink(event: TokenEvent, answer: Answer = answer, future: Any = future) -> None:
                answer.tokens += event.token_ids
                answer.times += [time.monotonic()] * len(event.token_ids)
                answer.logprobs += [entry.logprob for entry in event.prompt_logprobs or ()]
                answer.transport = event.times.transport if event.times is not None else answer.transport
                if event.finish_reason is not None or event.ticket is not None:
                    answer.last = event
                    if not future.done():
                        future.set_result(None)

            request = Submit(
                request_id=secrets.token_hex(8), prompt_token_ids=prompt, params=params, **fields
            )
            self.client.submit(request, sink)
        await asyncio.wait_for(asyncio.gather(*done), LIMIT_S)
        return answers


def _show(progress: EngineProgress) -> None:
    pass


def prompts_of(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    numbers = np.random.default_rng(seed).integers(10, vocabulary, (count, length))
    return [row.tolist() for row in numbers]


def percentiles(values: list[float]) -> tuple[float, list[float]]:
    low, middle, high = np.percentile(values, (10, 50, 90))
    return float(middle), [float(low), float(high)]


async def tokens(folder: Path, tp: int, results: Results) -> None:
    prompts = prompts_of(24, 150, SHAPES["small"]["vocab_size"])
    common = {"max_kv_tokens": 40000, "max_batch_size": 32, "max_num_tokens": 2048, "max_seq_len": 1024}
    async with (
        Running("small", folder, 1, results.quant, **common) as one,
        Running("small", folder, tp, results.quant, **common) as several,
    ):
        expected = await one.ask(prompts, 40)
        found = await several.ask(prompts, 40)
        again = await several.ask(prompts, 40)
        drawn = [await several.ask(prompts[:4], 20, temperature=0.8, seed=5) for _ in range(2)]
        told_one = await one.ask(prompts[:2], 1, prompt_logprobs=True, num_logprobs=0)
        told = await several.ask(prompts[:2], 1, prompt_logprobs=True, num_logprobs=0)
        penalized = await several.ask(prompts[:2], 20, repetition_penalty=1.3)
        penalized_one = await one.ask(prompts[:2], 20, repetition_penalty=1.3)
        errors = np.abs(np.array(told[0].logprobs) - np.array(told_one[0].logprobs))
        results.add(
            what="tokens", tp=tp, sequences=len(prompts), kernel=several.ready.kernel,
            same_first_token=sum(a.tokens[0] == b.tokens[0] for a, b in zip(found, expected, strict=True)),
            same_40_tokens=sum(a.tokens == b.tokens for a, b in zip(found, expected, strict=True)),
            repeats=sum(a.tokens == b.tokens for a, b in zip(found, again, strict=True)),
            drawn_repeats=[a.tokens for a in drawn[0]] == [a.tokens for a in drawn[1]],
            penalized_same=sum(a.tokens == b.tokens for a, b in zip(penalized, penalized_one, strict=True)),
            logprob_error_max=float(errors.max()), logprob_error_mean=float(errors.mean()),
            start_s=[one.start_s, several.start_s],
        )  # fmt: skip
        for name, context, generation in (("one to several", one, several), ("several to one", several, one)):
            await moved(name, context, generation, prompts_of(8, 700, 8000, seed=name.count("o")), results)


async def moved(
    name: str, context: Running, generation: Running, prompts: list[list[int]], results: Results
) -> None:
    """A context leg at one engine, the generation leg at the other."""
    expected = await context.ask([[*prompt, 9] for prompt in prompts], 20)
    same, transports = 0, set()
    for prompt, whole in zip(prompts, expected, strict=True):
        prompt = [*prompt, 9]
        (first,) = await context.ask([prompt], 20, request_type="context_only")
        assert first.last is not None and first.last.ticket is not None, first.last
        (rest,) = await generation.ask(
            [prompt],
            20,
            request_type="generation_only",
            ticket=first.last.ticket,
            output_token_ids=first.tokens,
        )
        same += first.tokens + rest.tokens == whole.tokens
        transports.add(rest.transport)
    stats = generation.client.stats
    results.add(
        what="kv moved", how=name, sequences=len(prompts), same_20_tokens=same, transports=sorted(transports),
        failures=stats.fetch_failures,
    )  # fmt: skip


async def speed(folder: Path, tp: int, results: Results) -> None:
    for size in (1, tp):
        settings = {
            "max_batch_size": 256,
            "max_num_tokens": 8192,
            "max_seq_len": 2304,
            "enable_block_reuse": False,
        }
        async with Running("8b", folder, size, results.quant, max_kv_tokens=300_000, **settings) as engine:
            results.add(what="start", shape="8b", tp=size, start_s=engine.start_s, kernel=engine.ready.kernel)
            await engine.ask(prompts_of(2, 2048, 100_000), 4)
            rates = []
            for seed in range(3):
                prompts = prompts_of(32, 2048, 100_000, seed)
                began = time.monotonic()
                await engine.ask(prompts, 1)
                rates.append(32 * 2048 / (time.monotonic() - began))
            results.add(
                what="prefill", shape="8b", tp=size, rows=32, length=2048, tokens_per_s=max(rates), all=rates
            )
            for rows, context in DECODES:
                await engine.ask(prompts_of(rows, context - 64, 100_000, rows), 8)
                answers = await engine.ask(prompts_of(rows, context - 64, 100_000, rows + 1), 128)
                begin = max(answer.times[0] for answer in answers)
                end = min(answer.times[-1] for answer in answers)
                times = np.array([moment for moment in answers[0].times if begin <= moment <= end])
                middle, spread = percentiles((np.diff(times) * 1e3).tolist())
                mean = float((times[-1] - times[0]) * 1e3 / (len(times) - 1))
                results.add(
                    what="decode", shape="8b", tp=size, rows=rows, context=context, ms=middle, spread=spread,
                    mean_ms=mean, steps=len(times),
                )  # fmt: skip


async def kill(folder: Path, tp: int, results: Results) -> None:
    def used() -> list[int]:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]

    before = used()
    async with Running(
        "small", folder, tp, results.quant, max_kv_tokens=400_000, max_batch_size=16, max_num_tokens=2048
    ) as engine:
        during = used()
        (rank, *_) = _children(engine.ready.pid)
        running = asyncio.create_task(engine.ask(prompts_of(8, 100, 8000), 4000))
        await asyncio.sleep(1.0)
        began = time.monotonic()
        os.kill(rank, signal.SIGKILL)
        code = await asyncio.wait_for(asyncio.shield(engine.client.died), LIMIT_S)
        died_s = time.monotonic() - began
        answers = await running
        while used() > before and time.monotonic() - began < 20:
            await asyncio.sleep(0.1)
        results.add(
            what="kill", tp=tp, engine_gone_s=died_s, exit_code=code, memory_free_s=time.monotonic() - began,
            used_mib=[before, during, used()], errors=[a.last.error for a in answers if a.last][:1],
        )  # fmt: skip


def _children(pid: int) -> Iterator[int]:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, file.read_text().split())


def collectives(tp: int, results: Results) -> None:
    """In processes of its own; rank 0 prints a line of JSON for each case."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).parent / "gpu" / "collective_ways.py"), folder, str(tp)]
        ranks = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(tp)
        ]
        try:
            lines, _ = ranks[0].communicate(timeout=LIMIT_S)
        finally:
            for rank in ranks:
                rank.kill()
    for line in lines.splitlines():
        if line.startswith("{"):
            results.add(what="collective", tp=tp, **json.loads(line))


PARTS = {"tokens": tokens, "speed": speed, "kill": kill}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", action="append", choices=["collectives", *PARTS])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--quant", choices=tuple(QUANTIZATIONS), default="none", help="of the weights")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = Results(arguments.output, arguments.quant)
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.part or ["collectives", *PARTS]:
            if part == "collectives":
                collectives(arguments.tp, results)
            else:
                asyncio.run(PARTS[part](Path(folder), arguments.tp, results))


if __name__ == "__main__":
    main()
