"""What it costs to hand a request from the context to the generation worker, in both schedule styles.

    python benchmarks/handover.py [--tokens 128,512,1500] [--rounds 12] [--output benchmarks/results/handover.json]
    python benchmarks/handover.py --device cuda --shape 1b --tokens 2048,8192    two GPUs, one for each worker

Starts one context worker, one generation worker, and in front of both a router for each style. The styles take
turns, every prompt is new. From the workers' own clocks (one host, so they agree): `handover_ms` from the step
that drew the first token to the first step that can draw the second; `wire_ms` of it went into the copy that the
generation worker waited for. From the client's: the first token, the second, and how much later. `--concurrency`
has that many clients at a time, instead of one; then the last two figures are the ones to look at.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from gpu.dummy_model import SHAPES, write_model
from serving import machine
from serving.mesh import Mesh
from serving.prompts import real_text

STYLES = ("context_first", "generation_first")
NUM_TOKENS = 4
PERCENTILES = (10, 50, 90)  # on a machine with other work, the first says most about the program


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights instead of --model")
    parser.add_argument("--tokens", type=numbers, default=[128, 512, 1500], help="prompt lengths")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--max-num-tokens", type=int, help="tokens in one step [the worker's default]")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def start(mesh: Mesh, model: str, options: argparse.Namespace) -> None:
    settings: dict[str, Any] = {"device": options.device}
    if options.shape:
        settings["load_format"] = "dummy"  # what is measured does not depend on what a model says
    if options.max_num_tokens:
        settings["max_num_tokens"] = options.max_num_tokens
    for number, role in enumerate(("context", "generation")):
        gpu = number if options.device == "cuda" else None
        mesh.worker(role, model, role.upper(), settings, gpu)
    for style in STYLES:
        mesh.router(style, schedule_style=style)


class Client:
    def __init__(self, session: aiohttp.ClientSession, urls: dict[str, str]) -> None:
        self._session = session
        self._urls = urls
        self._words = real_text()
        self._random = random.Random(0)

    async def measure(self, style: str, num_tokens: int) -> dict[str, float]:
        """One request; times in milliseconds."""
        request_id = f"{style}-{self._random.getrandbits(60):x}"
        start = self._random.randrange(len(self._words) // 2)
        body = {
            "prompt": " ".join(self._words[start : start + 2 * num_tokens]),
            "truncate_prompt_tokens": num_tokens,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": request_id,
        }
        headers = {"X-Request-ID": request_id}
        started, arrivals = time.monotonic(), []
        async with self._session.post(
            f"{self._urls[style]}/v1/completions", json=body, headers=headers
        ) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    count = sum(len(choice.get("token_ids") or []) for choice in event["choices"])
                    arrivals += [time.monotonic()] * count
        if len(arrivals) != NUM_TOKENS:
            raise RuntimeError(f"{len(arrivals)} tokens came, {NUM_TOKENS} were asked for")
        context, generation = [await self._entry(role, request_id) for role in ("context", "generation")]
        return {
            "handover_ms": (generation["ready_at"] - context["drawn_at"]) * 1000,
            "wire_ms": generation["wire_s"] * 1000,
            "wire_mb": generation["wire_bytes"] / 1e6,
            "first_token_ms": (arrivals[0] - started) * 1000,
            "second_token_ms": (arrivals[1] - started) * 1000,
            "first_to_second_ms": (arrivals[1] - arrivals[0]) * 1000,
        }

    async def _entry(self, role: str, request_id: str) -> dict[str, Any]:
        url = f"{self._urls[role]}/perf_metrics?request_id={request_id}"
        async with self._session.get(url) as response:
            (entry,) = await response.json(content_type=None)
        return dict(entry)


async def measure_all(urls: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        client = Client(session, urls)
        for num_tokens in options.tokens:
            samples: dict[str, list[dict[str, float]]] = {style: [] for style in STYLES}
            for round_number in range(options.rounds + 1):
                for style in STYLES if round_number % 2 else reversed(STYLES):
                    asked = (client.measure(style, num_tokens) for _ in range(options.concurrency))
                    answers = await asyncio.gather(*asked)
                    if round_number:  # the first one warms up
                        samples[style] += answers
            results += [summary(style, num_tokens, samples[style]) for style in STYLES]
            for result in results[-len(STYLES) :]:
                show(result)
    return results


def summary(style: str, num_tokens: int, samples: list[dict[str, float]]) -> dict[str, Any]:
    for sample in samples:
        sample["above_wire_ms"] = sample["handover_ms"] - sample["wire_ms"]
    figures: dict[str, Any] = {"style": style, "tokens": num_tokens, "requests": len(samples)}
    for name in samples[0]:
        values = sorted(sample[name] for sample in samples)
        last = len(values) - 1
        figures[name] = {f"p{p}": round(values[round(p / 100 * last)], 3) for p in PERCENTILES}
    return figures


def show(result: dict[str, Any]) -> None:
    names = (
        "handover_ms",
        "wire_ms",
        "above_wire_ms",
        "first_token_ms",
        "second_token_ms",
        "first_to_second_ms",
    )
    figures = "  ".join(
        f"{name} " + "/".join(f"{value:.1f}" for value in result[name].values()) for name in names
    )
    print(f"{result['tokens']:>6} {result['style']:<17} {figures}", flush=True)


def main() -> None:
    options = parse_arguments()
    before = machine.describe()
    with tempfile.TemporaryDirectory(prefix="handover-") as folder, Mesh(Path(folder)) as mesh:
        model = options.model
        if options.shape:
            model = str(write_model(Path(folder) / options.shape, options.shape))
        start(mesh, model, options)
        results = asyncio.run(measure_all(mesh.urls, options))
    if options.output is not None:
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        report = {"machine": before, "settings": settings, "results": results}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
