"""A worker without an engine: speaks docs/protocol.md with scripted tokens, gates and failures.

Runs on a real loopback socket inside the test's loop. Every request's fate is recorded, so that a test can
wait for what it expects instead of sleeping.
"""

import asyncio
import base64
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

from diptych.journal import END, HEADER, Entry, journal_line
from diptych.wire import FETCHED_HEADER

Leg = Literal["context", "generation", "whole"]
Failure = Literal[
    "no_answer", "mid_head", "before_body", "mid_body", "mid_chunk", "hang", "hang_body", "after_end"
]


@dataclass
class Seen:
    """One request that came in."""

    leg: Leg
    path: str
    body: dict[str, Any]
    raw: bytes
    headers: dict[str, str]
    fate: str = "running"  # then: done, cancelled


@dataclass
class Script:
    """What the worker does. Change it at any time; it is read when a request comes in."""

    tokens: list[str] = field(default_factory=lambda: ["one", " two", " three", " four"])
    finish_on_context: bool = False
    fail: dict[Leg, Failure] = field(default_factory=dict)
    answer: dict[Leg, tuple[int, dict[str, Any], dict[str, str]]] = field(default_factory=dict)
    hold: dict[Leg, asyncio.Event] = field(default_factory=dict)  # the leg answers when it is set
    hold_after: dict[int, asyncio.Event] = field(default_factory=dict)  # stream: before token n
    state: str = "READY"
    keeps_journal: bool = True
    fetched: str | None = "1"  # what a generation leg says of its KV
    padding: int = 0  # bytes added to each event


class FakeWorker:
    """Use as ``async with``; `url` is valid inside, and a stopped worker's port refuses connections."""

    def __init__(self, name: str, *, role: str = "CONTEXT", model: str = "fake") -> None:
        self.name = name
        self.role = role
        self.model = model
        self.script = Script()
        self.seen: list[Seen] = []
        self.released: list[str] = []
        self.revoked: list[str] = []
        self.url = ""
        self.port = 0
        self.has_server_info = True
        self.incarnation = "1"
        self.kv_endpoint = ""  # where its prefills can be followed
        self.hangs = False  # new requests and probes are not answered
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> "FakeWorker":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._serve)
        app.router.add_post("/kv/release", self._release)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    def legs(self, leg: Leg) -> list[Seen]:
        return [seen for seen in self.seen if seen.leg == leg]

    async def wait_for(self, condition: Any, timeout_s: float = 5.0) -> None:
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(condition), timeout_s)

    async def wait_fate(self, leg: Leg, fate: str) -> None:
        await self.wait_for(lambda: any(seen.fate == fate for seen in self.legs(leg)))

    async def _note(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _server_info(self, request: web.Request) -> web.Response:
        if self.hangs:
            await asyncio.Event().wait()
        if not self.has_server_info:
            raise web.HTTPNotFound
        return web.json_response(
            {
                "worker_id": self.name,
                "role": self.role,
                "model": self.model,
                "models": [self.model],
                "incarnation": self.incarnation,
                "state": self.script.state,
                "layout": {},
                "kernel": "fake",
                "kv_endpoint": self.kv_endpoint,
                "version": "0",
            }
        )

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.script.state == "READY" else 503)

    async def _release(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        self.released += wanted.get("ticket_ids", [])
        self.revoked += wanted.get("disagg_request_ids", [])
        await self._note()
        return web.json_response({})

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw)
        kind = body.get("disaggregated_params", {}).get("request_type")
        leg: Leg = {"context_only": "context", "generation_only": "generation"}.get(kind, "whole")
        seen = Seen(leg, request.path, body, raw, dict(request.headers))
        self.seen.append(seen)
        await self._note()
        try:
            if leg in self.script.hold:
                await self.script.hold[leg].wait()
            response = await self._answer(request, seen)
            seen.fate = "done"
            return response
        except asyncio.CancelledError:
            seen.fate = "cancelled"
            raise
        finally:
            await asyncio.shield(self._note())

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        leg, failure = seen.leg, self.script.fail.get(seen.leg)
        transport = request.transport
        assert transport is not None
        if leg in self.script.answer:
            status, content, headers = self.script.answer[leg]
            return web.json_response(content, status=status, headers=headers)
        if failure == "hang":
            await asyncio.Event().wait()
        if failure in ("no_answer", "mid_head"):
            if failure == "mid_head":
                transport.write(b"HTTP/1.1 200 OK\r\nContent-Ty")
            transport.close()
            await asyncio.Event().wait()
        if leg == "context":
            return web.json_response(self._prefill(seen), headers={"Server-Timing": "prefill;dur=1.5"})
        if seen.body.get("stream") is True:
            return await self._stream(request, seen, failure)
        if failure == "mid_body":
            transport.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"half":')
            transport.close()
            await asyncio.Event().wait()
        return web.json_response(self.answer(seen.body), headers=self._fetched(leg))

    def _fetched(self, leg: Leg) -> dict[str, str]:
        said = self.script.fetched
        return {} if said is None or leg != "generation" else {FETCHED_HEADER: said}

    def _prefill(self, seen: Seen) -> dict[str, Any]:
        params = seen.body["disaggregated_params"]
        finished = self.script.finish_on_context
        ticket_id = f"{self.name}-ticket-{len(self.seen)}"
        answer = {
            "id": params["response_id"],
            "object": "text_completion",
            "created": params["created"],
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "text": self.script.tokens[0],
                    "finish_reason": "stop" if finished else "not_finished",
                    "disaggregated_params": {
                        **params,
                        "first_gen_tokens": [42],
                        "encoded_opaque_state": base64.b64encode(ticket_id.encode()).decode(),
                        "ticket_id": ticket_id,
                    },
                }
            ],
            "usage": {"prompt_tokens": 3},
            "prompt_token_ids": [[1, 2, 3]],
            "finished": finished,
        }
        if seen.body.get("stream") is True:
            answer["stream_head"] = self.event(self.script.tokens[0]) + (
                "data: [DONE]\n\n" if finished else ""
            )
        return answer

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The whole answer that a client gets from this worker."""
        params = body.get("disaggregated_params", {})
        return {"id": params.get("response_id", "own"), "choices": [{"text": "".join(self.script.tokens)}]}

    def event(self, text: str) -> str:
        return f"data: {json.dumps({'text': text, 'by': self.name, 'pad': 'x' * self.script.padding})}\n\n"

    def events(self, *, skip: int) -> str:
        """The stream of a leg, as it must reach the client."""
        return "".join(self.event(text) for text in self.script.tokens[skip:]) + "data: [DONE]\n\n"

    async def _stream(self, request: web.Request, seen: Seen, failure: Failure | None) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", **self._fetched(seen.leg)}
        )
        journaled = self.script.keeps_journal and seen.headers.get(HEADER) == "1"
        if journaled:
            response.headers[HEADER] = "1"
        await response.prepare(request)
        transport = request.transport
        assert transport is not None
        if failure in ("before_body", "hang_body"):
            (await response.prepare(request)).send_headers()  # type: ignore[union-attr]
            if failure == "before_body":
                transport.close()
            await asyncio.Event().wait()
        skip = 0
        if seen.leg == "generation":
            choices = seen.body["disaggregated_params"].get("choices")  # an early leg has none yet
            skip = 1 if choices is None else len(choices[0]["first_gen_tokens"])
        for number, text in enumerate(self.script.tokens[skip:], start=skip):
            if number in self.script.hold_after:
                await self.script.hold_after[number].wait()
            line = journal_line([Entry(0, [42 + number])]) if journaled else b""
            await response.write(line + self.event(text).encode())
            if failure == "mid_chunk":
                transport.write(b'40\r\n: 0=99\ndata: {"text": "hal')
            if failure in ("mid_body", "mid_chunk"):
                transport.close()
                await asyncio.Event().wait()
        await response.write((END if journaled else b"") + b"data: [DONE]\n\n")
        if failure == "after_end":
            transport.close()
            await asyncio.Event().wait()
        await response.write_eof()
        return response
