"""Clients of the fault tests: requests whose whole outcome can be compared, and what is done in the middle."""

import asyncio
import itertools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
PATIENCE_S = 150.0
STORY = "Tell a long story about the sea and the wind. "

# One of each thing that a resumed stream could get wrong.
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETION, {"prompt": STORY, "temperature": 0}),
    "seeded": (COMPLETION, {"prompt": STORY, "temperature": 0.9, "top_p": 0.95, "seed": 11, "n": 2}),
    "penalties": (
        COMPLETION,
        {"prompt": STORY, "temperature": 0.7, "seed": 5, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    ),
    "chat with stop": (
        CHAT,
        {
            "messages": [{"role": "user", "content": "Count from one to fifty in words."}],
            "temperature": 0,
            "stop": ["never said", "\n\n\n\n"],
            "ignore_eos": False,
        },
    ),
    "logprobs": (COMPLETION, {"prompt": STORY, "temperature": 0, "logprobs": 2}),
    "echo, two prompts": (COMPLETION, {"prompt": [STORY, "日本の首都は 🙂"], "temperature": 0, "echo": True}),
}


@dataclass
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)  # (finish_reason, stop_reason): one, or the stream is wrong
    roles: int = 0


@dataclass
class Outcome:
    """What one stream brought. `worker` and times aside, equal outcomes are equal to the client."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Any = None
    errors: list[Any] = field(default_factory=list)
    dones: int = 0
    stall_s: float = field(default=0.0, compare=False)  # longest wait between two events
    status: int = field(default=0, compare=False)
    retry_after_s: int | None = field(default=None, compare=False)


def body_of(name: str, max_tokens: int, **fields: Any) -> tuple[str, dict[str, Any]]:
    """A streaming request; its salt keeps it from using another one's cached blocks."""
    path, body = BODIES[name]
    common = {
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "cache_salt": secrets.token_hex(8),
    }
    return path, {**common, **body, **fields}


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    request: tuple[str, dict[str, Any]],
    *,
    headers: dict[str, str] | None = None,
    on_event: Callable[[int], None] | None = None,
) -> Outcome:
    """`on_event` is called with the number of each event, from 1."""
    outcome = Outcome()
    path, body = request
    clock = asyncio.get_running_loop().time
    number, last = 0, clock()
    async with session.post(url + path, json=body, headers=headers) as response:
        outcome.status = response.status
        if response.status != 200:
            outcome.retry_after_s = int(response.headers.get("Retry-After", 0)) or None
            outcome.errors.append(await response.json())
            return outcome
        async for line in response.content:
            if not line.strip():
                continue
            assert line.startswith(b"data: "), line
            now = clock()
            outcome.stall_s, last = max(outcome.stall_s, now - last), now
            take(outcome, line[6:].strip())
            number += 1
            if on_event is not None:
                on_event(number)
    return outcome


def take(outcome: Outcome, data: bytes) -> None:
    assert outcome.dones == 0, "an event after [DONE]"
    if data == b"[DONE]":
        outcome.dones += 1
        return
    event = orjson.loads(data)
    if "error" in event:
        outcome.errors.append(event)
        return
    if event.get("usage"):
        assert outcome.usage is None, "two usages"
        outcome.usage = event["usage"]
    for part in event["choices"]:
        choice = outcome.choices.setdefault(part["index"], Choice())
        assert not choice.ends, "a choice goes on after its end"
        delta = part.get("delta", {})
        choice.text += part.get("text", "") or delta.get("content", "")
        choice.roles += "role" in delta
        choice.token_ids += part.get("token_ids") or []
        if part["logprobs"] is not None:
            choice.logprobs.append(part["logprobs"])
        if part["finish_reason"] is not None:
            choice.ends.append((part["finish_reason"], part.get("stop_reason")))


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    """The whole answer, once, as if nothing had happened."""
    assert outcome.errors == [], outcome.errors
    assert outcome.dones == 1
    assert {index: len(choice.ends) for index, choice in outcome.choices.items()} == dict.fromkeys(
        expected.choices, 1
    )
    assert outcome == expected


class Load:
    """Clients that ask one after the other until the end of the block; then every answer must have been whole."""

    def __init__(
        self, url: str, expected: Mapping[str, Outcome], num_tokens: int, *, num_clients: int = 2
    ) -> None:
        """`expected`: what to ask for, by name (BODIES), and what it brings."""
        self.outcomes: list[Outcome] = []
        self.violations: list[str] = []
        self._url = url
        self._expected = expected
        self._num_tokens = num_tokens
        self._num_clients = num_clients
        self._stop = False
        self._progress = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def longest_stall_s(self) -> float:
        return max((outcome.stall_s for outcome in self.outcomes), default=0.0)

    async def more(self, count: int) -> None:
        """Wait for so many more answers, or for the first wrong one."""
        wanted = len(self.outcomes) + count
        async with self._progress:
            there = self._progress.wait_for(lambda: len(self.outcomes) >= wanted or self.violations)
            await asyncio.wait_for(there, PATIENCE_S)

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(self._num_clients)]
        await self.more(self._num_clients)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)
        if kind is None:
            assert self.violations == []

    async def _ask(self, number: int) -> None:
        names = itertools.cycle(self._expected)
        async with session() as client:
            for name in itertools.islice(names, number, None):
                if self._stop:
                    return
                await self._ask_once(client, name)

    async def _ask_once(self, client: aiohttp.ClientSession, name: str) -> None:
        try:
            outcome = await stream(client, self._url, body_of(name, self._num_tokens))
            assert_same(outcome, self._expected[name])
        except (AssertionError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            self.violations.append(f"{name}: {type(error).__name__}: {error}")
        else:
            self.outcomes.append(outcome)
        async with self._progress:
            self._progress.notify_all()


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    )
