"""One worker over HTTP: against a server that answers with scripted bytes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from diptych.errors import DeadlineExceeded, WorkerLost
from diptych.router.client import WorkerClient
from diptych.router.connection import Connection
from diptych.router.settings import Limits

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


class ByteServer:
    """Answers the n-th request of each connection with the n-th piece of bytes, then closes."""

    def __init__(self, *answers: list[bytes]) -> None:
        self.answers = [*answers]
        self.accepted = 0
        self.closed = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        answers = self.answers[min(self.accepted, len(self.answers) - 1)]
        self.accepted += 1
        try:
            for answer in answers:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                await writer.drain()
            if answers and answers[-1] == b"":
                await reader.read()  # no answer: wait until the client gives up
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.closed.set()


@asynccontextmanager
async def connected(server: ByteServer, limits: Limits | None = None) -> AsyncIterator[WorkerClient]:
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    client = WorkerClient(f"127.0.0.1:{port}", limits or Limits())
    try:
        yield client
    finally:
        client.close()
        for connection in [*client.connections]:
            connection.abort()
        listener.close()
        await asyncio.gather(*server.tasks)


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


async def test_connection_is_kept_and_used_again():
    server = ByteServer([OK, OK, OK])
    async with connected(server) as client:
        for _ in range(3):
            reply = await client.request("GET", "/", deadline=soon())
            assert (reply.status, reply.body) == (200, b"ok")
    assert server.accepted == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\n\r\nok",
        OK + b"excess",
    ],
    ids=["close", "no length", "excess"],
)
async def test_connection_that_cannot_be_kept_is_not(answer):
    server = ByteServer([answer])
    async with connected(server) as client:
        for _ in range(2):
            assert (await client.request("GET", "/", deadline=soon())).body == b"ok"
    assert server.accepted == 2


async def test_stale_connection_is_retried_once_on_a_new_one():
    server = ByteServer([OK], [OK, OK])
    async with connected(server) as client:
        await client.request("GET", "/", deadline=soon())
        (kept,) = client.connections
        kept.transport.pause_reading()  # the server's close is not seen before the next request
        await server.closed.wait()
        kept.transport.resume_reading()
        assert (await client.request("GET", "/", deadline=soon())).body == b"ok"
    assert server.accepted == 2


async def test_fresh_connection_that_closes_is_not_retried():
    server = ByteServer([])
    async with connected(server) as client:
        with pytest.raises(WorkerLost, match="before it answered"):
            await client.request("GET", "/", deadline=soon())
    assert server.accepted == 1


async def test_informational_answers_are_skipped():
    server = ByteServer([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK])
    async with connected(server) as client:
        assert (await client.request("GET", "/", deadline=soon())).status == 200


async def test_answer_without_body():
    server = ByteServer([b"HTTP/1.1 204 No Content\r\n\r\n", OK])
    async with connected(server) as client:
        assert (await client.request("GET", "/", deadline=soon())).body == b""
        assert (await client.request("GET", "/", deadline=soon())).body == b"ok"
    assert server.accepted == 1


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"]
)
async def test_nonsense_is_a_lost_worker(answer):
    async with connected(ByteServer([answer, b""])) as client:
        with pytest.raises(WorkerLost, match=r"does not speak HTTP/1\.1"):
            await client.request("GET", "/", deadline=soon())
        assert not client.connections or all(c.transport.is_closing() for c in client.connections)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
)
async def test_body_that_breaks_off(answer):
    async with connected(ByteServer([answer])) as client:
        with pytest.raises(WorkerLost, match="in the middle"):
            await client.request("GET", "/", deadline=soon())


async def test_refused_connection() -> None:
    client = WorkerClient("127.0.0.1:1", Limits())
    with pytest.raises(WorkerLost, match="cannot be reached"):
        await client.request("GET", "/", deadline=soon())


async def test_deadline_before_the_answer_closes_the_connection():
    server = ByteServer([b""])
    async with connected(server) as client:
        with pytest.raises(DeadlineExceeded):
            await client.request("GET", "/", deadline=soon(0.1))
        await asyncio.wait_for(server.closed.wait(), 5)


async def test_deadline_that_has_passed():
    async with connected(ByteServer([OK])) as client:
        with pytest.raises(DeadlineExceeded):
            await client.request("GET", "/", deadline=soon(-1))


async def test_silence_in_the_body_has_its_own_limit():
    server = ByteServer([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b""])
    async with connected(server, Limits(idle_s=0.1)) as client:
        with pytest.raises(DeadlineExceeded, match=r"sent nothing for 0\.1 s"):
            await client.request("GET", "/", deadline=soon())


class Collected:
    """A sink that never is full."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> bool:
        self.data += data
        return True

    async def drain(self) -> None:
        pass


async def until_it_is_not_read(connection: Connection) -> None:
    while connection.transport.is_reading():
        await asyncio.sleep(0)


@pytest.mark.parametrize("ask", ["read", "relay", "first"])
async def test_of_a_body_that_nobody_asks_for_little_is_held(ask):
    chunk, num_chunks = b"x" * 10_000, 4000
    framed = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"2710\r\n%b\r\n" % chunk * num_chunks
    async with connected(ByteServer([framed + b"0\r\n\r\n", OK])) as client:
        async with client.exchange("GET", "/", deadline=soon(60)) as exchange:
            (connection,) = client.connections
            await asyncio.wait_for(until_it_is_not_read(connection), 30)
            sink = Collected()
            if ask == "first":
                sink.data = await exchange.first()
                assert 64 * 1024 < len(sink.data) < 10 * 64 * 1024
            if ask == "read":
                sink.data = await exchange.read()
            else:
                await exchange.relay(sink)
            assert sink.data == chunk * num_chunks
        assert (await client.request("GET", "/", deadline=soon())).body == b"ok"


async def test_leaving_early_closes_the_connection():
    server = ByteServer([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b""])
    async with connected(server) as client:
        async with client.exchange("GET", "/", deadline=soon()) as exchange:
            assert await exchange.first() == b"half"
        await asyncio.wait_for(server.closed.wait(), 5)


async def test_cancelling_closes_the_connection():
    server = ByteServer([b""])
    async with connected(server) as client:
        task = asyncio.create_task(client.request("GET", "/", deadline=soon()))
        while not client.connections:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait_for(server.closed.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_old_idle_connections_are_not_used():
    server = ByteServer([OK, OK])
    async with connected(server, Limits(keep_alive_s=0.0)) as client:
        for _ in range(2):
            await client.request("GET", "/", deadline=soon())
            await asyncio.sleep(0.001)  # time passes: that is what is tested
    assert server.accepted == 2
