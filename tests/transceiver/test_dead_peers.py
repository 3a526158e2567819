"""Over every transport: an owner or a reader that is killed or frozen, before, during and after a fetch."""

import signal
import time

import numpy as np
from conformance import ONE_SIDED, bytes_of, collected_footprint, footprint, owner_process, wait_until
from kv_nodes import LAYOUT, WIDE, Gate

from diptych.transceiver.settings import FetchDone


def test_owner_killed_before_the_fetch(processes, nodes, transport):
    owner = owner_process(processes, transport, "tiny")
    reader = nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer([1, 2])
    owner.signal(signal.SIGKILL)
    started = time.monotonic()
    assert reader.result(reader.transceiver.fetch(ticket, [0, 1], [0, 1])).code == "peer_gone"
    assert time.monotonic() - started < 2


def test_owner_killed_between_fetches(processes, nodes, transport):
    """The reader knows this owner, holds connections to it and perhaps its memory."""
    mapped_before = collected_footprint()[2]
    owner = owner_process(processes, transport, "tiny")
    reader = nodes(seed=2, backends=(transport,))
    assert isinstance(reader.result(reader.transceiver.fetch(owner.offer([1])[1], [0], [0])), FetchDone)
    _, ticket = owner.offer([2])
    owner.signal(signal.SIGKILL)
    outcome = reader.result(reader.transceiver.fetch(ticket, [0], [0]))
    if isinstance(outcome, FetchDone):  # memory that is still mapped is as good as ever
        assert transport in ONE_SIDED
        assert np.array_equal(reader.blocks[0], bytes_of(LAYOUT, 48, 7)[2])
    else:
        assert outcome.code == "peer_gone"
    wait_until(lambda: footprint()[2] == mapped_before + 1, "the dead owner's memory stays mapped")


def test_owner_killed_in_the_middle(processes, nodes, gate: Gate, transport):
    owner = owner_process(processes, transport)
    reader = nodes(WIDE, num_blocks=48, seed=2, backends=(transport,))
    _, ticket = owner.offer(list(range(48)))
    fetch_id = reader.transceiver.fetch(ticket, range(48), range(48))
    gate.wait()
    owner.signal(signal.SIGKILL)
    gate.open.set()
    outcome = reader.result(fetch_id)
    if transport in ONE_SIDED:  # nobody can touch these pages any more, and they carry their proof
        assert isinstance(outcome, FetchDone), outcome
        assert np.array_equal(reader.blocks, bytes_of(WIDE, 48, 7))
    else:
        assert outcome.code == "peer_gone"


def test_stopped_owner(processes, nodes, transport):
    owner = owner_process(processes, transport, "tiny")
    reader = nodes(seed=2, backends=(transport,), timeout_s=0.5)
    ticket_id, ticket = owner.offer([1, 2])
    owner.signal(signal.SIGSTOP)
    started = time.monotonic()
    outcome = reader.result(reader.transceiver.fetch(ticket, [0, 1], [0, 1]))
    took_s = time.monotonic() - started
    if transport in ONE_SIDED:
        assert isinstance(outcome, FetchDone), outcome
        assert took_s < 0.5, "the acknowledgement must not be waited for"
    else:
        assert outcome.code == "deadline"
        assert 0.4 < took_s < 2
    owner.signal(signal.SIGCONT)
    if took_s < 0.4:  # within the time that the link waits for its greeting
        assert owner.hear("ended") == {"ended": ticket_id, "reason": "released"}


def test_owner_stopped_in_the_middle(processes, nodes, gate: Gate, transport):
    owner = owner_process(processes, transport, lease_s=4.0)
    reader = nodes(WIDE, num_blocks=48, seed=2, backends=(transport,), timeout_s=2.0)
    ticket_id, ticket = owner.offer(list(range(48)))
    fetch_id = reader.transceiver.fetch(ticket, range(48), range(48))
    gate.wait()
    owner.signal(signal.SIGSTOP)
    gate.open.set()
    outcome = reader.result(fetch_id)
    if transport in ONE_SIDED:
        assert isinstance(outcome, FetchDone), outcome
    else:
        assert outcome.code == "deadline"
    reader.blocks[:] = 7  # they are somebody else's now
    owner.signal(signal.SIGCONT)
    ended = owner.hear("ended")
    assert ended["ended"] == ticket_id
    assert ended["reason"] in ("released", "expired"), (
        "stopped before the reader's link was up: only time ends it"
    )
    again = reader.transceiver.fetch(owner.offer([3])[1], [0], [0])
    assert isinstance(reader.result(again), FetchDone)
    assert np.all(reader.blocks[1:] == 7), "the fetch that was given up still writes"


def test_reader_killed_in_the_middle(processes, nodes, transport):
    owner = nodes(seed=1, backends=(transport,))
    reader = owner_process(processes, transport, "tiny")
    ticket_id, ticket = owner.offer([1, 2])
    reader.tell(fetch=ticket.hex(), indices=[0, 1], blocks=[0, 1])
    reader.hear("halfway")
    # Over shared memory the copy does not wait for the owner to hear of it.
    wait_until(
        lambda: owner.transceiver.metrics().open_leases_read == 1, "the owner has not heard of the reader"
    )
    reader.signal(signal.SIGKILL)
    ended = owner.ended(ticket_id, patience_s=2)
    assert (ended.reason, ended.block_ids) == ("peer_gone", (1, 2))
