"""The public port, byte by byte: framing, limits, keep-alive, hand-over, slow and vanishing clients."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from diptych.listen import open_listener
from diptych.router.downstream import Downstream
from diptych.router.faces import Faces

PATH = "/v1/completions"


class Pages(asyncio.Protocol):
    """Where other requests go."""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\npage:" + data)
        self.transport.close()


class Echo:
    """Answers with what came; waits for `gate` before."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.gate.set()
        self.bodies: list[bytes] = []
        self.cancelled = asyncio.Event()
        self.stream: list[bytes] | None = None

    async def __call__(self, head, body: bytes, client: Downstream, arrived: float) -> None:
        self.bodies.append(body)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.stream is None:
            client.answer(200, b"echo:" + body)
            return
        await client.start(b"first")
        for part in self.stream:
            if not client.write(part):
                await client.drain()
        await client.finish(5.0)


@asynccontextmanager
async def face(echo: Echo, **settings) -> AsyncIterator[tuple[int, Faces]]:
    settings = {"max_body_bytes": 1000, "body_s": 5.0, "keep_alive_s": 5.0, **settings}
    faces = Faces(echo, (PATH,), Pages, **settings)
    listener = open_listener("127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(faces, sock=listener)
    try:
        yield listener.getsockname()[1], faces
    finally:
        server.close()
        await faces.close()
        await server.wait_closed()


@asynccontextmanager
async def client(port: int):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


def request(body: bytes, *headers: str, version: str = "1.1", length: bool = True) -> bytes:
    lines = [f"POST {PATH} HTTP/{version}", "Host: x", *headers]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    async def read():
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return int(status.split()[1]), headers, body

    return await asyncio.wait_for(read(), 5)


async def test_requests_follow_each_other_on_one_connection():
    async with face(Echo()) as (port, _), client(port) as (reader, writer):
        for body in (b"one", b"", b"three"):
            writer.write(request(body))
            status, headers, echoed = await answer(reader)
            assert (status, echoed) == (200, b"echo:" + body)
            assert "connection" not in headers
            assert headers["date"].endswith("gmt")


async def test_pipelined_requests_are_answered_in_order():
    echo = Echo()
    async with face(echo) as (port, _), client(port) as (reader, writer):
        writer.write(request(b"one") + b"\r\n" + request(b"two") + request(b"three"))
        assert [(await answer(reader))[2] for _ in range(3)] == [b"echo:one", b"echo:two", b"echo:three"]


@pytest.mark.parametrize("step", [1, 7])
async def test_a_request_in_small_pieces(step):
    echo = Echo()
    chunked = request(b"", "Transfer-Encoding: chunked", length=False)
    whole = request(b"one") + chunked + b"3\r\ntwo\r\n4;x=y\r\nmore\r\n0\r\n\r\n"
    async with face(echo) as (port, _), client(port) as (reader, writer):
        for start in range(0, len(whole), step):
            writer.write(whole[start : start + step])
            await writer.drain()
            await asyncio.sleep(0)
        assert (await answer(reader))[2] == b"echo:one"
        assert (await answer(reader))[2] == b"echo:twomore"


async def test_expect_continue():
    async with face(Echo()) as (port, _), client(port) as (reader, writer):
        head, body = request(b"hello", "Expect: 100-continue")[:-5], b"hello"
        writer.write(head)
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await answer(reader))[2] == b"echo:hello"


async def test_http_1_0_gets_a_stream_that_ends_with_the_connection():
    echo = Echo()
    echo.stream = [b" second"]
    async with face(echo) as (port, _), client(port) as (reader, writer):
        writer.write(request(b"", version="1.0"))
        head, _, body = (await asyncio.wait_for(reader.read(-1), 5)).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert b"Connection: close" in head
        assert body == b"first second"


async def test_other_requests_are_handed_over_with_all_that_came():
    async with face(Echo()) as (port, faces), client(port) as (reader, writer):
        writer.write(request(b"one"))
        await answer(reader)
        writer.write(b"GET /health HTTP/1.1\r\n\r\n")
        assert b"page:GET /health" in await asyncio.wait_for(reader.read(-1), 5)
        assert faces.open == set()


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nA: " + b"x" * 70_000, 431),
        (request(b"", "Transfer-Encoding: chunked", length=False) + b"zz\r\n", 400),
        (request(b"x" * 1001), 413),
        (request(b"", "Transfer-Encoding: chunked", length=False) + b"3e9\r\n" + b"x" * 1001 + b"\r\n", 413),
    ],
)
async def test_what_cannot_be_taken_in_is_answered_and_closed(raw, status):
    echo = Echo()
    async with face(echo) as (port, _), client(port) as (reader, writer):
        writer.write(raw)
        got, headers, body = await answer(reader)
        assert got == status
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["message"]
        assert await asyncio.wait_for(reader.read(), 5) == b""
    assert echo.bodies == []


async def test_an_endless_chunk_is_cut_off():
    async with face(Echo()) as (port, _), client(port) as (reader, writer):
        writer.write(
            request(b"", "Transfer-Encoding: chunked", length=False) + b"ffffffff\r\n" + b"x" * 80_000
        )
        assert (await answer(reader))[0] == 413


async def test_a_body_that_does_not_come_is_a_timeout():
    async with face(Echo(), body_s=0.05) as (port, _), client(port) as (reader, writer):
        writer.write(request(b"12345")[:-1])
        assert (await answer(reader))[0] == 504


async def test_a_client_that_leaves_cancels_its_request():
    echo = Echo()
    echo.gate.clear()
    async with face(echo) as (port, faces):
        async with client(port) as (_, writer):
            writer.write(request(b"one") + request(b"two"))
            while not echo.bodies:
                await asyncio.sleep(0.001)
        await asyncio.wait_for(echo.cancelled.wait(), 5)
        assert echo.bodies == [b"one"]
        assert faces.open == set()


async def test_a_slow_reader_holds_the_stream_up_and_loses_nothing():
    echo = Echo()
    echo.stream = [bytes([65 + n % 26]) * 100_000 for n in range(100)]
    async with face(echo) as (port, faces), client(port) as (reader, writer):
        writer.write(request(b""))
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        while not any(face.is_full for face in faces.open):
            await asyncio.sleep(0.001)
        body = b""
        while not body.endswith(b"0\r\n\r\n"):
            body += await asyncio.wait_for(reader.read(1 << 20), 5)
        framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [b"first", *echo.stream])
        assert body == framed + b"0\r\n\r\n"


async def test_idle_connections_are_closed_after_their_time():
    async with face(Echo(), keep_alive_s=0.1) as (port, _), client(port) as (reader, writer):
        writer.write(request(b"one"))
        await answer(reader)
        assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_draining_answers_once_more_and_closes():
    echo = Echo()
    async with (
        face(echo) as (port, faces),
        client(port) as (idle, idle_writer),
        client(port) as (reader, writer),
    ):
        idle_writer.write(request(b"one"))
        await answer(idle)
        echo.gate.clear()
        writer.write(request(b"two"))
        while len(echo.bodies) < 2:
            await asyncio.sleep(0.001)
        draining = asyncio.create_task(faces.drain(5.0, keep_idle=True))
        while not faces.is_draining:
            await asyncio.sleep(0.001)
        idle_writer.write(request(b"three"))
        echo.gate.set()
        assert (await answer(reader))[2] == b"echo:two"
        _, headers, body = await answer(idle)
        assert (body, headers["connection"]) == (b"echo:three", "close")
        writer.write(request(b"four"))  # began before the drain: its connection may be used once more
        _, headers, body = await answer(reader)
        assert (body, headers["connection"]) == (b"echo:four", "close")
        await asyncio.wait_for(draining, 5)


async def test_stopping_closes_idle_connections_at_once():
    async with face(Echo()) as (port, faces), client(port) as (reader, writer):
        writer.write(request(b"one"))
        await answer(reader)
        await asyncio.wait_for(faces.drain(60.0, keep_idle=False), 2)
        assert await asyncio.wait_for(reader.read(), 5) == b""
