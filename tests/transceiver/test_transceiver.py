"""What is the transceiver's own: leases on a fake clock, the choice of transport, digests, counters."""

import logging
import os
import re
import socket
import time

import msgspec
import numpy as np
import pytest
from kv_nodes import LAYOUT, forge

from diptych.errors import ConfigError
from diptych.transceiver import digest
from diptych.transceiver import ticket as tickets
from diptych.transceiver.digest import OwnerDigests
from diptych.transceiver.host_region import HostRegion
from diptych.transceiver.pool_memory import PoolMemory
from diptych.transceiver.settings import FetchDone, LeaseEnded


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def change_region(ticket: bytes, **changes: object) -> bytes:
    """A ticket whose shm region is another than the owner's."""
    transports = dict(tickets.decode(ticket).transports)
    region = msgspec.msgpack.decode(transports["shm"], type=HostRegion)
    transports["shm"] = msgspec.msgpack.encode(msgspec.structs.replace(region, **changes))
    return forge(ticket, transports=transports)


def test_an_unread_ticket_expires_by_the_clock(nodes):
    clock = Clock()
    owner = nodes(seed=1, clock=clock, lease_s=30.0)
    ticket_id, _ = owner.offer([7, 8])
    clock.now += 29.9
    assert owner.transceiver.poll(clock.now) == []
    clock.now += 0.2
    assert owner.transceiver.poll(clock.now) == [LeaseEnded(ticket_id, (7, 8), "expired")]
    assert owner.transceiver.poll(clock.now + 1000) == []
    assert owner.transceiver.metrics().leases_ended == {"expired": 1}


def test_a_sleeping_engine_is_woken_for_an_expired_lease(nodes):
    owner = nodes(seed=1, lease_s=0.05)
    ticket_id, _ = owner.offer([7])
    assert owner.ended(ticket_id, patience_s=3).reason == "expired"


def test_the_router_cancels(nodes):
    owner = nodes(seed=1)
    ticket_id, _ = owner.offer([7])
    owner.transceiver.release(ticket_id)
    owner.transceiver.release(ticket_id)
    owner.transceiver.release("never heard of")
    assert owner.transceiver.poll(time.monotonic()) == [LeaseEnded(ticket_id, (7,), "cancelled")]


def test_a_fetch_after_the_lease_may_succeed_or_be_stale_but_never_ends_it_twice(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    ticket_id, ticket = owner.offer([7])
    owner.transceiver.release(ticket_id)
    assert isinstance(reader.result(reader.transceiver.fetch(ticket, [0], [0])), FetchDone)
    second_id, second = owner.offer([8])
    reader.result(reader.transceiver.fetch(second, [0], [0]))
    owner.ended(second_id)
    assert [event.reason for event in owner.seen] == ["cancelled"]


def test_a_fetch_of_nothing_says_whether_its_owner_hears_of_it(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    first_id, first = owner.offer([7])
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # has this port, and never answers
        astray = forge(first, port=nobody.getsockname()[1])
        assert not reader.result(reader.transceiver.fetch(astray, [], [])).told
    assert reader.result(reader.transceiver.fetch(first, [0], [0])).told
    owner.ended(first_id)  # they have met
    _, second = owner.offer([8])
    assert reader.result(reader.transceiver.fetch(second, [], [])).told


def test_one_log_line_says_which_transport_and_why(nodes, caplog):
    owner, reader = nodes(seed=1), nodes(seed=2)
    with caplog.at_level(logging.INFO, "diptych.transceiver.routes"):
        for block in range(3):
            reader.result(reader.transceiver.fetch(owner.offer([block])[1], [0], [block]))
    (record,) = [r for r in caplog.records if "KV transport to" in r.message]
    assert re.fullmatch(r"KV transport to 127\.0\.0\.1:\d+ = shm, because same host", record.message)


def test_another_pid_namespace_falls_to_tcp_and_says_how_to_mend_it(nodes, caplog):
    owner, reader = nodes(seed=1), nodes(seed=2)
    ticket = change_region(owner.offer([4])[1], pid_namespace="pid:[1]")
    with caplog.at_level(logging.INFO, "diptych.transceiver.routes"):
        for block in range(2):
            done = reader.result(reader.transceiver.fetch(ticket, [0], [block]))
            assert isinstance(done, FetchDone)
            assert done.transport == "tcp"
    assert np.array_equal(reader.memory.blocks[0], owner.memory.blocks[4])
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "cannot be shm" in warning
    assert "pid" in warning
    assert "shareProcessNamespace" in warning
    (line,) = [r.message for r in caplog.records if " = tcp, because" in r.message]
    assert "not shm: it is on the same host in another pid namespace" in line


def test_another_host_falls_to_tcp_without_a_warning(nodes, caplog):
    owner, reader = nodes(seed=1), nodes(seed=2)
    ticket = change_region(owner.offer([4])[1], boot_id="another")
    with caplog.at_level(logging.INFO, "diptych.transceiver"):
        assert reader.result(reader.transceiver.fetch(ticket, [0], [0])).transport == "tcp"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("change", [{"fd": 0}, {"fd": 999}, {"pid": 2**22 + 1}, {"pid": 1, "fd": 0}])
def test_a_wrong_descriptor_is_not_trusted(nodes, change):
    owner, reader = nodes(seed=1), nodes(seed=2)
    ticket = change_region(owner.offer([4])[1], **change)
    done = reader.result(reader.transceiver.fetch(ticket, [0], [0]))
    assert isinstance(done, FetchDone)
    assert done.transport == "tcp"


def test_the_pool_of_a_neighbour_is_not_trusted(nodes):
    """The descriptor is a KV pool of the same shape, but another engine's."""
    owner, other, reader = nodes(seed=1), nodes(seed=3), nodes(seed=2)
    ticket = change_region(owner.offer([4])[1], fd=other.memory.fd)
    done = reader.result(reader.transceiver.fetch(ticket, [0], [0]))
    assert done.transport == "tcp"
    assert np.array_equal(reader.memory.blocks[0], owner.memory.blocks[4])


def test_no_common_transport(nodes):
    owner, reader = nodes(seed=1, backends=("tcp",)), nodes(seed=2, backends=("shm",))
    failed = reader.result(reader.transceiver.fetch(owner.offer([4])[1], [0], [0]))
    assert failed.code == "peer_gone"
    assert "none in common" in failed.message


def test_an_unknown_backend_names_the_known_ones(nodes):
    with pytest.raises(ConfigError, match="'rdma', allowed are shm, cuda_ipc, tcp"):
        nodes(seed=1, backends=("rdma",))


def test_an_error_of_ours_is_an_event_too(nodes, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    owner, reader = nodes(seed=1), nodes(seed=2)

    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(digest.LandedDigests, "landed", explode)
    failed = reader.result(reader.transceiver.fetch(owner.offer([4])[1], [0], [0]))
    assert (failed.code, failed.message) == ("internal", "RuntimeError: boom")


def test_full_blocks_are_digested_once_a_generation(nodes, monkeypatch):
    memory = nodes(seed=1).memory
    read: list[int] = []
    plain = PoolMemory.digest
    monkeypatch.setattr(PoolMemory, "digest", lambda self, blocks: read.extend(blocks) or plain(self, blocks))
    digests = OwnerDigests(memory, LAYOUT.tokens_per_block)
    num_tokens = 2 * LAYOUT.tokens_per_block + 1  # the third block is not full
    first = digests.of([3, 4, 5], [0, 0, 0], num_tokens)
    memory.blocks[5] ^= 1
    second = digests.of([3, 4, 5], [0, 0, 0], num_tokens)
    assert read == [3, 4, 5, 5]
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    memory.blocks[4] ^= 1
    assert digests.of([4], [1], LAYOUT.tokens_per_block) != [first[1]]
    assert read[-1] == 4


def test_poll_is_cheap_when_nothing_happened(nodes):
    node = nodes(seed=1)
    node.offer([1])
    now = time.monotonic()
    started = time.perf_counter()
    for _ in range(1000):
        assert node.transceiver.poll(now) == []
    assert time.perf_counter() - started < 0.1


def test_no_descriptor_reaches_a_child(nodes):
    node = nodes(seed=1)
    assert not os.get_inheritable(node.memory.fd)


def test_copies_are_counted_by_owner_and_transport(nodes):
    owner = nodes(seed=1, backends=("tcp",))
    reader = nodes(seed=2, backends=("tcp",), measure_transports=True)
    done = reader.result(reader.transceiver.fetch(owner.offer([1, 2])[1], range(2), [0, 1]))
    _, stale = owner.offer([3])
    owner.memory.generations[3] += 1
    failed = reader.result(reader.transceiver.fetch(stale, range(1), [3]))
    assert (type(done), failed.code) == (FetchDone, "stale")
    host, port = owner.transceiver.address
    [link] = reader.transceiver.metrics().links
    assert (link.peer, link.transport, link.copies, link.open) == (f"{host}:{port}", "tcp", 1, 0)
    assert (link.bytes, link.copy_s, link.failures) == (done.bytes, done.wire_s, {"stale": 1})
    assert link.wait_s > 0
    assert link.verify_s > 0
