"""`trtllm-serve demo`: the small model on a context and a generation worker, one question, where time went.

An ordinary client of the router; what it prints comes from the stream, Server-Timing and /perf_metrics.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import click
import orjson

from diptych.errors import StartupError
from diptych.launcher import Supervisor, default_config
from diptych.launcher import run as launch
from diptych.launcher.plan import DEFAULT_MODEL
from diptych.listen import open_listener

QUESTION = "Explain in three sentences why the sky is blue."
_DEFAULT_PORT = 8000
_MAX_TOKENS = 160
_TIMEOUT_S = 120.0


def run(*, once: bool, prompt: str | None, port: int | None) -> int:
    """With `once` until the answer is there, else until Ctrl-C; the exit code."""
    question = prompt or QUESTION

    async def when_ready(supervisor: Supervisor) -> int | None:
        assert supervisor.url is not None
        try:
            await _show_answer(supervisor.url, supervisor.worker_urls, question)
        except (aiohttp.ClientError, asyncio.TimeoutError, DemoFailed) as error:
            click.echo(f"error: no answer: {error or type(error).__name__}", err=True)
            return 1
        if once:
            return 0
        _invite(supervisor.url)
        return None

    click.echo(f"Starting {DEFAULT_MODEL}: one context worker, one generation worker, one router.")
    config = default_config({"port": _free_port() if port is None else port})
    return launch(config, when_ready=when_ready)


class DemoFailed(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client saw: times in seconds, and the stages that the router and the context worker report."""

    request_id: str
    ttft_s: float
    decode_s: float  # first to last token
    num_prompt_tokens: int
    num_tokens: int
    stages_ms: Mapping[str, float]


async def _show_answer(url: str, worker_urls: Mapping[str, str], question: str) -> None:
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        # Connections and shared memory are set up by a first request; the figures are those of the second.
        await _ask(session, url, "Hello", max_tokens=4, show=False)
        click.echo(f"\n> {question}\n")
        answer = await _ask(session, url, question, max_tokens=_MAX_TOKENS, show=True)
        transfer = await _transfer(session, worker_urls["gen0"], answer.request_id)
    click.echo(f"\n\n{figures(answer, transfer)}\n")


async def _ask(
    session: aiohttp.ClientSession, url: str, question: str, *, max_tokens: int, show: bool
) -> Answer:
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    first = last = 0.0
    usage: Mapping[str, Any] = {}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise DemoFailed(f"HTTP {response.status}: {await response.text()}")
        async for event in _events(response):
            if "error" in event:
                raise DemoFailed(str(event["error"].get("message")))
            usage = event.get("usage") or usage
            text = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
            if text:
                last = time.perf_counter()
                first = first or last
                if show:
                    click.echo(text, nl=False)
        headers = response.headers
    return Answer(
        request_id=headers.get("X-Request-ID", ""),
        ttft_s=first - began,
        decode_s=last - first,
        num_prompt_tokens=int(usage.get("prompt_tokens", 0)),
        num_tokens=int(usage.get("completion_tokens", 0)),
        stages_ms=server_timing(headers.get("Server-Timing", "")),
    )


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        data = line.strip().removeprefix(b"data: ")
        if data and data != b"[DONE]" and data != line.strip():
            yield orjson.loads(data)


async def _transfer(session: aiohttp.ClientSession, url: str, request_id: str) -> Mapping[str, Any]:
    """What the generation worker says about the request; nothing when it does not keep that."""
    async with session.get(f"{url}/perf_metrics", params={"request_id": request_id}) as response:
        entries = await response.json() if response.status == 200 else []
    return entries[-1] if entries else {}


def server_timing(header: str) -> dict[str, float]:
    """Milliseconds by stage. Of a stage that is reported twice the last one counts."""
    return {name: float(ms) for name, ms in re.findall(r"([\w.-]+);dur=([\d.]+)", header)}


def figures(answer: Answer, transfer: Mapping[str, Any]) -> str:
    """One line; what nobody reported is left out."""
    parts = []
    prefill_ms = answer.stages_ms.get("ctx_prefill", answer.stages_ms.get("prefill"))
    if prefill_ms is not None:
        parts.append(f"prefill {prefill_ms:.1f} ms ({answer.num_prompt_tokens} tokens)")
    if transfer.get("wire_bytes"):
        megabytes = f"KV {transfer['wire_bytes'] / 1e6:.2f} MB over {transfer['transport']}"
        wire_s = transfer.get("wire_s") or 0.0
        parts.append(
            f"{megabytes}, {transfer['wire_bytes'] / wire_s / 1e9:.1f} GB/s" if wire_s else megabytes
        )
    if "first_token_s" in transfer:
        parts.append(f"handover {transfer['first_token_s'] * 1e3:.1f} ms")
    parts.append(f"TTFT {answer.ttft_s * 1e3:.1f} ms")
    if answer.decode_s > 0 and answer.num_tokens > 1:
        parts.append(f"{(answer.num_tokens - 1) / answer.decode_s:.1f} tokens/s")
    return " | ".join(parts)


def _invite(url: str) -> None:
    click.echo(f"Serving on {url} until you press Ctrl-C. Try:\n")
    click.echo(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\")
    click.echo(
        f'    -d \'{{"model": "{DEFAULT_MODEL}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'\n'
    )


def _free_port() -> int:
    """8000 as everywhere else, or any other when somebody has it."""
    try:
        with open_listener("localhost", _DEFAULT_PORT):
            return _DEFAULT_PORT
    except StartupError:
        return 0
