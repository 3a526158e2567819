"""A way for KV blocks that tests can break: tickets that lead through a proxy, and who hands them out."""

import base64
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import aiohttp
import msgspec
import orjson
from aiohttp import web

from diptych.transceiver import ticket as tickets
from diptych.transceiver.ticket import Ticket
from diptych.transceiver.wires import StreamRegion
from tests.fakes.tcp_proxy import TcpProxy, Way


def ticket_of(params: dict[str, Any]) -> Ticket:
    """Of a choice's disaggregated_params."""
    return tickets.decode(base64.b64decode(params["encoded_opaque_state"]))


def through(proxy: TcpProxy, params: dict[str, Any]) -> dict[str, Any]:
    """The same choice, whose ticket leads through the proxy, over TCP."""
    ticket = ticket_of(params)
    region = msgspec.msgpack.decode(ticket.transports["tcp"], type=StreamRegion)
    region = msgspec.structs.replace(region, port=proxy.port)
    detour = msgspec.structs.replace(
        ticket, port=proxy.port, transports={"tcp": msgspec.msgpack.encode(region)}
    )
    return {**params, "encoded_opaque_state": base64.b64encode(tickets.encode(detour)).decode()}


class Detour:
    """A context worker as a router sees it, with all its tickets led through a silent proxy.

    Use as ``async with``.
    """

    def __init__(self, worker_url: str, silent_ways: Sequence[Way]) -> None:
        """`silent_ways`: none means both."""
        self._worker_url = worker_url
        self._silent_ways = silent_ways
        self.proxy: TcpProxy | None = None  # made when the first ticket says where the blocks are
        self.port = 0
        self._stack = ExitStack()

    async def __aenter__(self) -> "Detour":
        self._session = aiohttp.ClientSession()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._session.close()
        self._stack.close()

    async def _pass_on(self, request: web.Request) -> web.Response:
        names = ("Content-Type", "X-Request-ID", "X-Diptych-Timeout-Ms")
        headers = {name: request.headers[name] for name in names if name in request.headers}
        url = self._worker_url + request.path_qs
        async with self._session.request(
            request.method, url, data=await request.read(), headers=headers
        ) as response:
            answer = await response.read()
            if response.status == 200 and b'"encoded_opaque_state"' in answer:
                answer = self._lead_through(orjson.loads(answer))
            return web.Response(body=answer, status=response.status, content_type="application/json")

    def _lead_through(self, answer: dict[str, Any]) -> bytes:
        for choice in answer["choices"]:
            params = choice["disaggregated_params"]
            if self.proxy is None:
                self.proxy = self._stack.enter_context(TcpProxy(ticket_of(params).port))
                self.proxy.silence(*self._silent_ways)
            choice["disaggregated_params"] = through(self.proxy, params)
        return orjson.dumps(answer)
