"""A network that cuts, loses or delays what a reader and an owner say to each other (peers' faults F1, F9, F19)."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from kv_nodes import WIDE

from diptych.transceiver.settings import FetchDone, FetchFailed, LeaseEnded
from tests.fakes.tcp_proxy import TcpProxy

NUM_BLOCKS = 16
BYTES = NUM_BLOCKS * WIDE.block_bytes
OTHER_LOOPBACK = "127.0.0.2"  # the proxy listens there, on the owner's port


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def far_owner(nodes, stack: ExitStack, **settings):
    owner = nodes(WIDE, num_blocks=NUM_BLOCKS, seed=1, advertise_host=OTHER_LOOPBACK, **settings)
    _, port = owner.transceiver.address
    proxy = stack.enter_context(TcpProxy(port, listen_host=OTHER_LOOPBACK, listen_port=port))
    return owner, proxy


def fetch_all(reader, ticket: bytes) -> int:
    return reader.transceiver.fetch(ticket, range(NUM_BLOCKS), range(NUM_BLOCKS))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_connections_are_cut_in_the_middle_of_a_copy(nodes, stack, part):
    owner, proxy = far_owner(nodes, stack, backends=("tcp",))
    reader = nodes(WIDE, num_blocks=NUM_BLOCKS, seed=2, backends=("tcp",))
    ticket_id, ticket = owner.offer(list(range(NUM_BLOCKS)))
    proxy.cut_after = int(part * BYTES)
    outcome = reader.result(fetch_all(reader, ticket))
    assert isinstance(outcome, FetchFailed)
    assert outcome.code == "peer_gone"
    assert owner.ended(ticket_id, patience_s=2).reason in ("peer_gone", "released")
    proxy.cut_after = None
    again = reader.result(fetch_all(reader, owner.offer(list(range(NUM_BLOCKS)))[1]))
    assert isinstance(again, FetchDone), again


def test_silence_ends_the_fetch_and_the_lease(nodes, stack):
    """Neither side hears of the other any more: each ends it by its own clock."""
    owner, proxy = far_owner(nodes, stack, backends=("tcp",), lease_s=1.0)
    reader = nodes(WIDE, num_blocks=NUM_BLOCKS, seed=2, backends=("tcp",), timeout_s=0.5)
    ticket_id, ticket = owner.offer(list(range(NUM_BLOCKS)))
    proxy.silence()
    outcome = reader.result(fetch_all(reader, ticket))
    assert isinstance(outcome, FetchFailed)
    assert outcome.code in ("deadline", "peer_gone")
    assert owner.ended(ticket_id, patience_s=2).reason == "expired"
    proxy.heal()
    again = reader.result(fetch_all(reader, owner.offer(list(range(NUM_BLOCKS)))[1]))
    assert isinstance(again, FetchDone), again


def test_a_notice_that_is_delayed_beyond_the_lease_ends_nothing_twice(nodes, stack):
    """Over shared memory only the notices go through the network: the copy is done, its end is told late."""
    owner, proxy = far_owner(nodes, stack, backends=("shm",), lease_s=1.0)
    reader = nodes(WIDE, num_blocks=NUM_BLOCKS, seed=2, backends=("shm",))
    first = reader.result(fetch_all(reader, owner.offer(list(range(NUM_BLOCKS)))[1]))
    assert isinstance(first, FetchDone), first  # the way is known now
    ticket_id, ticket = owner.offer(list(range(NUM_BLOCKS)))
    proxy.silence()
    assert isinstance(reader.result(fetch_all(reader, ticket)), FetchDone)
    assert owner.ended(ticket_id, patience_s=2).reason == "expired"
    proxy.heal()
    last_id, last = owner.offer(list(range(NUM_BLOCKS)))
    assert isinstance(reader.result(fetch_all(reader, last)), FetchDone)
    assert owner.ended(last_id, patience_s=2).reason == "released"  # told after the late notice
    late = [e for e in (*owner.seen, *owner.transceiver.poll(time.monotonic())) if isinstance(e, LeaseEnded)]
    assert ticket_id not in [event.ticket_id for event in late]
