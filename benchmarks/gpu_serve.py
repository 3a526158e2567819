"""The GPU engine as a server: starts `trtllm-serve` on random weights, checks its streams, and times its steps.

    python benchmarks/gpu_serve.py [--shape 8b] [--quant fp8] [--load 1x256 --load 64x1024 ...] [--output FILE.json]

Figures of a load: what its clients saw between two tokens (`itl_ms`), and the time between the ends of two decode
steps with all rows in them by the server's own `/metrics` (`step_ms`). Both are to be compared with the graph's time
in gpu_step.py; medians.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
from gpu.dummy_model import QUANTIZATIONS, write_model
from serving.mesh import Mesh

_OUTPUT_TOKENS = 128


@dataclass(frozen=True)
class Load:
    rows: int
    prompt: int

    @classmethod
    def parse(cls, text: str) -> "Load":
        rows, prompt = text.split("x")
        return cls(int(rows), int(prompt))


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[list[float], int]:
    """When each event with text came, and how many tokens the server counted."""
    times, tokens = [], 0
    async with session.post(
        url, json=body | {"stream": True, "stream_options": {"include_usage": True}}
    ) as answer:
        if answer.status != 200:
            raise SystemExit(f"error: {url}: {answer.status}: {await answer.text()}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"error: {url}: {event}")
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if event.get("choices"):
                times.append(time.perf_counter())
    return times, tokens


async def check(session: aiohttp.ClientSession, url: str, model: str) -> dict[str, Any]:
    """Both endpoints stream; greedy answers do not depend on the batch they are in."""
    body = {"model": model, "max_tokens": 16, "ignore_eos": True}
    message = {"messages": [{"role": "user", "content": "Good morning"}]}
    _, chat = await stream(session, f"{url}/v1/chat/completions", body | message | {"temperature": 0.8})
    greedy = body | {"prompt": list(range(5, 300)), "temperature": 0, "return_token_ids": True}

    async def tokens(extra: dict[str, Any]) -> list[int]:
        async with session.post(f"{url}/v1/completions", json=greedy | extra) as response:
            answer = await response.json()
        return list(answer["choices"][0]["token_ids"])

    alone = await tokens({})
    sampled = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    first, second = await tokens(sampled), await tokens(sampled)
    host = await tokens({"logprobs": 2})
    return {
        "chat_tokens": chat,
        "same_greedy_again": alone == await tokens({}),
        "same_with_host_sampling": alone == host,
        "same_sampled_again": first == second,
    }


async def measure(session: aiohttp.ClientSession, url: str, model: str, load: Load) -> dict[str, Any]:
    await session.get(f"{url}/metrics")  # forgets what was before

    async def one(number: int) -> tuple[list[float], int]:
        prompt = [(number * 7919 + place * 31) % 40000 for place in range(load.prompt)]
        body = {"model": model, "prompt": prompt, "max_tokens": _OUTPUT_TOKENS, "temperature": 0}
        return await stream(session, f"{url}/v1/completions", body | {"ignore_eos": True})

    began = time.perf_counter()
    answers = await asyncio.gather(*(one(number) for number in range(load.rows)))
    wall_s = time.perf_counter() - began
    async with session.get(f"{url}/metrics") as response:
        iterations = await response.json()
    wanted = [step for step in iterations if step["inflightBatchingStats"]["numGenRequests"] == load.rows]
    wanted = [step for step in wanted if step["inflightBatchingStats"]["numContextRequests"] == 0]
    last_first = max(times[0] for times, _ in answers)
    first_last = min(times[-1] for times, _ in answers)
    gaps = [
        after - before
        for times, _ in answers
        for before, after in pairwise(times)
        if last_first < before and after < first_last
    ]
    steps = [step["iterLatencyMS"] for step in wanted]
    return {
        "rows": load.rows,
        "prompt": load.prompt,
        "wrong_length": sum(tokens != _OUTPUT_TOKENS for _, tokens in answers),
        "itl_ms": statistics.median(gaps) * 1e3 if gaps else None,
        "mean_itl_ms": statistics.mean(gaps) * 1e3 if gaps else None,
        "step_ms": statistics.median(steps) if steps else None,
        "steps": len(steps),
        "output_tokens_per_s": load.rows * _OUTPUT_TOKENS / wall_s,
        "ttft_max_s": max(times[0] for times, _ in answers) - began,
        "gpu_mem_bytes": iterations[-1]["gpuMemUsage"] if iterations else None,
    }


async def run(arguments: argparse.Namespace, url: str, ready_s: float) -> None:
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
    ) as session:
        found: dict[str, Any] = {"shape": arguments.shape, "quant": arguments.quant, "ready_s": ready_s}
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        async with session.get(f"{url}/server_info") as response:
            info = await response.json()
        found["server"] = {
            name: info[name] for name in ("kernel", "max_seq_len", "max_batch_size", "version")
        }
        found["checks"] = await check(session, url, model)
        print(json.dumps(found), flush=True)
        await measure(session, url, model, Load(8, 64))  # warm
        found["loads"] = []
        for load in arguments.load or [Load(1, 256), Load(32, 1024), Load(64, 1024), Load(256, 1024)]:
            found["loads"].append(await measure(session, url, model, load))
            print(json.dumps(found["loads"][-1]), flush=True)
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["8b", "135m"], default="8b")
    parser.add_argument("--quant", choices=tuple(QUANTIZATIONS), default="none", help="of the weights")
    parser.add_argument("--load", action="append", type=Load.parse, metavar="ROWSxPROMPT")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--iterations", action="store_true", help="collect /metrics, which costs a little")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = {
        "device": arguments.device,
        "load_format": "dummy",
        "max_batch_size": 256,
        "max_num_tokens": 8192,
        "enable_iter_perf_stats": arguments.iterations,
        # What is found in the cache is not computed, and the rest then by other kernels that round otherwise.
        "kv_cache_config": {"enable_block_reuse": False},
    }
    with tempfile.TemporaryDirectory() as folder, Mesh(Path(folder)) as mesh:
        model = write_model(Path(folder) / arguments.shape, arguments.shape, arguments.quant)
        began = time.perf_counter()
        mesh.worker("worker", str(model), None, settings, gpu=None)
        asyncio.run(run(arguments, mesh.urls["worker"], time.perf_counter() - began))


if __name__ == "__main__":
    main()
