"""A peer that misbehaves loses its connection, one without the secret gets nothing, everyone else goes on."""

import logging
import socket
import struct

import msgspec
import numpy as np
import pytest
from kv_nodes import LAYOUT, Node

from diptych.errors import StartupError, TransferError
from diptych.transceiver import frames
from diptych.transceiver.connection import dial
from diptych.transceiver.frames import Begin, Hello, Prove, Read, Sending, Welcome
from diptych.transceiver.server import Server
from diptych.transceiver.settings import FetchDone
from diptych.transceiver.stop import Stop

POOL_BYTES = 32 * LAYOUT.block_bytes


def ends(sock: socket.socket) -> bool:
    """The other side closes without a word more."""
    sock.settimeout(5)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def still_serves(owner: Node, reader: Node) -> bool:
    _, ticket = owner.offer([1])
    return isinstance(reader.result(reader.transceiver.fetch(ticket, [0], [0])), FetchDone)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("<I", 0),
        struct.pack("<I", frames.MAX_FRAME_BYTES + 1),
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
        frames.encode(Begin("t")),
        frames.encode(Read(b"", b"")),
        struct.pack("<I", 10) + msgspec.msgpack.encode({"type": "hello"})[:10],
    ],
)
def test_garbage_costs_the_connection_and_a_log_line(nodes, caplog, garbage):
    owner, reader = nodes(seed=1, backends=("tcp",)), nodes(seed=2, backends=("tcp",))
    with caplog.at_level(logging.WARNING, "diptych.transceiver.server"):
        with socket.create_connection(owner.transceiver.address) as sock:
            sock.sendall(garbage)
            assert ends(sock)
        assert still_serves(owner, reader)
    assert [r for r in caplog.records if "does not speak our protocol" in r.message]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("control", Read(b"", b"")),
        ("data", Begin("t")),
        ("data", Read(b"odd", b"")),
        ("data", Read(np.array([POOL_BYTES - 8, 16]).tobytes(), b"")),
        ("data", Read(np.array([-16, 16]).tobytes(), b"")),
        ("data", Read(np.array([0, -16]).tobytes(), b"")),
        ("data", Read(np.array([2**62, 2**62]).tobytes(), b"")),
        ("data", Read(np.array([16, 2**63 - 1]).tobytes(), b"")),
        ("data", Read(b"", np.array([32]).tobytes())),
        ("data", Read(b"", np.array([-1]).tobytes())),
    ],
)
def test_nonsense_after_the_greeting_costs_the_connection(nodes, kind, message):
    owner, reader = nodes(seed=1, backends=("tcp",)), nodes(seed=2, backends=("tcp",))
    stop = Stop(5)
    connection = dial(owner.transceiver.address, kind, owner.memory.identity.incarnation, None, stop)
    connection.send(message, stop)
    with pytest.raises(OSError, match=r"closed|reset"):
        connection.receive(stop)
    connection.close()
    assert still_serves(owner, reader)


def test_a_peer_that_vanishes_in_a_frame_harms_nobody(nodes):
    owner, reader = nodes(seed=1, backends=("tcp",)), nodes(seed=2, backends=("tcp",))
    with socket.create_connection(owner.transceiver.address) as sock:
        sock.sendall(struct.pack("<I", 1000) + b"half")
    assert still_serves(owner, reader)


def test_another_protocol_version_is_refused(nodes):
    owner = nodes(seed=1, backends=("tcp",))
    with socket.create_connection(owner.transceiver.address) as sock:
        hello = Hello(frames.PROTOCOL_VERSION + 1, "data", owner.memory.identity.incarnation, bytes(16))
        sock.sendall(frames.encode(hello))
        sock.settimeout(5)
        answer = frames.decode(sock.recv(4096)[4:])
        assert "protocol version 2 was offered" in answer.message
        assert ends(sock)


@pytest.mark.parametrize(("owners", "readers"), [("a", "b"), ("a", None), (None, "b")])
def test_unequal_secrets_move_nothing_over_tcp(nodes, owners, readers):
    owner = nodes(seed=1, backends=("tcp",), secret=owners)
    reader = nodes(seed=2, backends=("tcp",), secret=readers)
    before = reader.memory.blocks.copy()
    _, ticket = owner.offer([1])
    assert reader.result(reader.transceiver.fetch(ticket, [0], [0])).code == "refused"
    assert np.array_equal(reader.memory.blocks, before)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_equal_secrets_work(nodes, transport):
    owner = nodes(seed=1, backends=(transport,), secret="a")
    reader = nodes(seed=2, backends=(transport,), secret="a")
    ticket_id, ticket = owner.offer([1])
    assert isinstance(reader.result(reader.transceiver.fetch(ticket, [0], [0])), FetchDone)
    assert owner.ended(ticket_id).reason == "released"


def test_a_reader_that_only_claims_to_know_the_secret_gets_nothing(nodes):
    """It echoes the owner's own proof and does not know better."""
    owner = nodes(seed=1, backends=("tcp",), secret="a")
    with socket.create_connection(owner.transceiver.address) as sock:
        sock.settimeout(5)
        sock.sendall(frames.encode(Hello(1, "data", owner.memory.identity.incarnation, bytes(16))))
        welcome = frames.decode(sock.recv(4096)[4:])
        assert isinstance(welcome, Welcome)
        assert welcome.wants_proof
        sock.sendall(frames.encode(Prove(welcome.proof)) + frames.encode(Read(b"", b"")))
        assert ends(sock)


def test_generation_numbers_alone_can_be_read(nodes):
    owner = nodes(seed=1, backends=("tcp",))
    owner.memory.generations[3] = 9
    stop = Stop(5)
    connection = dial(owner.transceiver.address, "data", owner.memory.identity.incarnation, None, stop)
    connection.send(Read(b"", np.array([3, 4]).tobytes()), stop)
    assert connection.receive(stop) == Sending(0)
    assert np.frombuffer(connection.receive(stop).generations, np.uint64).tolist() == [9, 0]
    connection.close()


def test_nobody_there_is_peer_gone():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
    with pytest.raises(TransferError) as caught:
        dial(address, "data", "x", None, Stop(5))
    assert caught.value.code == "peer_gone"


def test_a_wildcard_address_is_not_advertised():
    server = Server(incarnation="x", bind_host="0.0.0.0")
    assert server.address[0] != "0.0.0.0"
    server.close()
    named = Server(incarnation="x", bind_host="0.0.0.0", advertise_host="localhost")
    assert named.address[0] in ("127.0.0.1", "::1")
    named.close()


def test_a_taken_port_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            Server(incarnation="x", port=port)


def test_more_connections_than_allowed_are_turned_away(nodes, monkeypatch):
    owner, reader = nodes(seed=1, backends=("tcp",)), nodes(seed=2, backends=("tcp",))
    with monkeypatch.context() as patch:
        patch.setattr("diptych.transceiver.server.MAX_CONNECTIONS", 1)
        with socket.create_connection(owner.transceiver.address) as first:
            with socket.create_connection(owner.transceiver.address) as second:
                assert ends(second)
            first.sendall(b"garbage!")
            assert ends(first), "the first one was served"
    assert still_serves(owner, reader)
