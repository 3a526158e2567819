"""What prefix-aware routing brings: hit rate and time to first token of a shared-prefix, multi-turn trace.

    python benchmarks/routing.py [--rounds 3] [--processes 1,4] [--output benchmarks/results/routing.json]

Starts two context workers and one generation worker, and in front of them one router for each policy (with
several processes, the prefix-aware one once more for each number). The routers take turns within each round, on
the same workers; a salt of its own for each turn keeps one router's prefixes from another's. Hit rates are what
workers say that they found in their caches, beside what the router predicted. Ratios are against round_robin.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from routing_bench.mesh import Mesh
from routing_bench.trace import Conversation, TraceShape, conversations
from serving import machine

_POLICIES: dict[str, dict[str, Any]] = {
    "round_robin": {"type": "round_robin"},
    "load_balancing": {"type": "load_balancing"},
    "kv_cache_aware": {"type": "kv_cache_aware"},
    "kv_cache_aware, tokens": {"type": "kv_cache_aware", "use_tokens": True},
}
_BASE = "round_robin"
_PREFIX_AWARE = "kv_cache_aware"


@dataclass
class Turn:
    """What one router did with the trace once."""

    seconds: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    requests: int = 0
    errors: int = 0


async def run_trace(url: str, shape: TraceShape, trace: list[Conversation], salt: str) -> Turn:
    turn = Turn()
    todo = iter(trace)
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # so that all router processes get some
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def client() -> None:
            for conversation in todo:
                messages = [{"role": "system", "content": conversation.system}]
                for text in conversation.turns:
                    messages.append({"role": "user", "content": text})
                    answer = await ask(session, url, shape, messages, salt, turn)
                    messages.append({"role": "assistant", "content": answer})

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(shape.concurrency)))
        turn.seconds = time.perf_counter() - began
    return turn


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    shape: TraceShape,
    messages: list[dict[str, str]],
    salt: str,
    turn: Turn,
) -> str:
    body = {
        "messages": messages,
        "max_tokens": shape.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": salt,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    turn.requests += 1
    text, began, first = "", time.perf_counter(), None
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                piece = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                if first is None and piece:
                    first = time.perf_counter() - began
                text += piece
                if usage := event.get("usage"):
                    turn.prompt_tokens += usage["prompt_tokens"]
                    turn.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    except (aiohttp.ClientError, asyncio.TimeoutError, KeyError):
        turn.errors += 1
        return ""
    if first is None:
        turn.errors += 1
    else:
        turn.ttft_s.append(first)
    return text


def summarise(turns: list[Turn]) -> dict[str, Any]:
    ttft = sorted(seconds for turn in turns for seconds in turn.ttft_s)
    prompt, cached = sum(turn.prompt_tokens for turn in turns), sum(turn.cached_tokens for turn in turns)
    return {
        "requests": sum(turn.requests for turn in turns),
        "errors": sum(turn.errors for turn in turns),
        "hit_rate": round(cached / prompt, 4) if prompt else None,
        "ttft_mean_ms": round(1000 * statistics.fmean(ttft), 1) if ttft else None,
        "ttft_p50_ms": round(1000 * statistics.median(ttft), 1) if ttft else None,
        "ttft_p95_ms": round(1000 * ttft[int(len(ttft) * 0.95)], 1) if ttft else None,
        "seconds": [round(turn.seconds, 2) for turn in turns],
    }


async def predictions(url: str) -> tuple[float, float]:
    """Prompt tokens of context legs so far, and those that the router thought to be cached."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/prometheus/metrics") as response:
        lines = (await response.text()).splitlines()

    def total(name: str) -> float:
        found = (line for line in lines if line.startswith(name) and "context" in line)
        return sum(float(line.rpartition(" ")[2]) for line in found)

    return total("diptych_router_prefix_tokens_total"), total("diptych_router_prefix_matched_total")


def start(mesh: Mesh, options: argparse.Namespace) -> dict[str, str]:
    """The routers' URLs by name."""
    worker = {"num_threads": 1, "kv_cache_config": {"max_tokens": options.kv_tokens}}
    context = [mesh.worker(f"context{number}", options.model, "CONTEXT", worker) for number in range(2)]
    generation = [mesh.worker("generation", options.model, "GENERATION", {"num_threads": 1})]
    wanted = [(name, router, 1) for name, router in _POLICIES.items()]
    wanted += [
        (f"{_PREFIX_AWARE}, {processes} processes", _POLICIES[_PREFIX_AWARE], processes)
        for processes in options.processes
        if processes > 1
    ]
    routers = {}
    for name, router, processes in wanted:
        routers[name] = mesh.router(
            name.replace(", ", "-").replace(" ", "-"),
            {
                "num_workers": processes,
                "context_servers": {"urls": context, "router": router},
                "generation_servers": {"urls": generation},
            },
        )
    mesh.wait_ready(*context, *generation, *routers.values())
    return {name: f"http://{address}" for name, address in routers.items()}


async def measure(options: argparse.Namespace, urls: dict[str, str]) -> dict[str, Any]:
    shape = TraceShape(conversations=options.conversations, concurrency=options.concurrency)
    turns: dict[str, list[Turn]] = {name: [] for name in urls}
    before: dict[str, tuple[float, float]] = {}
    for name, url in urls.items():
        await run_trace(url, shape, conversations(shape, 999)[:2], f"warmup-{name}")
        before[name] = await predictions(url)
    for number in range(options.rounds):
        trace = conversations(shape, number)
        for name, url in urls.items():
            turns[name].append(await run_trace(url, shape, trace, f"{name}-{number}"))
            print(f"round {number} {name}: {summarise(turns[name][-1:])}", flush=True)
    results = {name: summarise(turns[name]) for name in urls}
    for name, url in urls.items():
        tokens, matched = (
            after - was for after, was in zip(await predictions(url), before[name], strict=True)
        )
        results[name]["predicted_hit_rate"] = round(matched / tokens, 4) if tokens else None
        mean, base = results[name]["ttft_mean_ms"], results[_BASE]["ttft_mean_ms"]
        results[name]["ttft_ratio"] = round(mean / base, 3) if mean and base else None
    return {"machine": machine.describe(), "trace": asdict(shape), "results": results}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="[SmolLM2-135M-Instruct]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument(
        "--conversations", type=int, default=18, help="in each round and for each router [18]"
    )
    parser.add_argument("--concurrency", type=int, default=4, help="conversations at once [4]")
    parser.add_argument("--kv-tokens", type=int, default=8192, help="size of a context worker's cache [8192]")
    parser.add_argument(
        "--processes",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1],
        metavar="N[,N...]",
        help="of the prefix-aware router [1]",
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="diptych-routing-") as folder, Mesh(Path(folder)) as mesh:
        result = asyncio.run(measure(options, start(mesh, options)))
    for name, entry in result["results"].items():
        print(f"{name:32} {json.dumps(entry)}")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if any(entry["errors"] for entry in result["results"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
