"""One streamed completion from an OpenAI server, and what a client can measure of it."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from serving.prompts import Prompt


@dataclass(frozen=True)
class Target:
    """A server under test. `extra` are body fields that only some servers take."""

    name: str
    url: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """Times in seconds since the request was sent."""

    wanted_tokens: int
    error: str | None = None
    ttft_s: float | None = None
    end_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # between events that carried text
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted_by_server: bool = False
    finish_reason: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return sum(self.gaps_s) / (self.output_tokens - 1)


async def complete(
    session: aiohttp.ClientSession, target: Target, prompt: Prompt, *, max_tokens: int
) -> Record:
    """Never raises for what the server does: the record says it."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    record = Record(wanted_tokens=max_tokens)
    began = time.perf_counter()
    try:
        async with session.post(f"{target.url}/v1/completions", json=body) as response:
            if response.status == 200:
                await _read_stream(response, record, began)
            else:
                record.error = f"HTTP {response.status}: {_message(await response.text())}"
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.end_s = time.perf_counter() - began
    if record.error is None and record.ttft_s is None:
        record.error = "the stream brought no token"
    return record


async def _read_stream(response: aiohttp.ClientResponse, record: Record, began: float) -> None:
    last = began
    done = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter()
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            record.error = f"in the stream: {event['error'].get('message')}"
            return
        if event.get("usage"):
            record.prompt_tokens = event["usage"]["prompt_tokens"]
            record.output_tokens = event["usage"]["completion_tokens"]
            record.counted_by_server = True
        for choice in event.get("choices", ()):
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
            if not choice.get("text"):
                continue
            if not record.counted_by_server:
                record.output_tokens += 1
            if record.ttft_s is None:
                record.ttft_s = now - began
            else:
                record.gaps_s.append(now - last)
            last = now
    if not done:
        record.error = "the stream ended without [DONE]"


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
