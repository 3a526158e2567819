"""Over every transport: a fetch that is aborted ends once, and lets go of its blocks before it says so."""

import signal
import time

import numpy as np
from conformance import owner_process
from kv_nodes import WIDE, Gate, Way

from diptych.transceiver.settings import FetchDone, FetchFailed


def test_abort_in_the_middle(nodes, gate: Gate, transport):
    owner = nodes(WIDE, num_blocks=48, seed=1, backends=(transport,))
    reader = nodes(WIDE, num_blocks=48, seed=2, backends=(transport,))
    ticket_id, ticket = owner.offer(list(range(48)))
    fetch_id = reader.transceiver.fetch(ticket, range(48), range(48))
    gate.wait()
    reader.transceiver.abort(fetch_id)
    assert reader.transceiver.poll(time.monotonic()) == [], "the copy has not let go yet"
    gate.open.set()
    assert reader.result(fetch_id).code == "cancelled"
    assert owner.ended(ticket_id).reason == "released"
    if transport != "cuda_ipc":  # its one kernel cannot be stopped
        assert not np.array_equal(reader.blocks[47], owner.blocks[47])
    assert isinstance(reader.result(reader.transceiver.fetch(owner.offer([1])[1], [0], [0])), FetchDone), (
        "the next fetch is not harmed"
    )


def test_abort_in_the_queue(nodes, gate: Gate, transport):
    owner = nodes(seed=1, backends=(transport,))
    reader = nodes(seed=2, backends=(transport,), max_concurrent_fetches=1)
    running = reader.transceiver.fetch(owner.offer([1])[1], [0], [0])
    gate.wait()
    ticket_id, ticket = owner.offer([2])
    queued = reader.transceiver.fetch(ticket, [0], [1])
    reader.transceiver.abort(queued)
    assert reader.result(queued).code == "cancelled"
    gate.open.set()
    assert isinstance(reader.result(running), FetchDone)
    assert owner.ended(ticket_id).reason == "released"


def test_aborting_what_has_ended_does_nothing(nodes, transport):
    node = nodes(seed=1, backends=(transport,))
    fetch_id = node.transceiver.fetch(node.offer([1])[1], [0], [2])
    node.result(fetch_id)
    node.transceiver.abort(fetch_id)
    node.transceiver.abort(12345)
    assert not [e for e in node.transceiver.poll(time.monotonic()) if isinstance(e, FetchFailed)]


def test_abort_of_a_fetch_from_a_stopped_owner(processes, nodes):
    owner = owner_process(processes, Way("tcp"), "tiny")
    reader = nodes(seed=2, backends=("tcp",), timeout_s=60.0)
    _, ticket = owner.offer([1])
    owner.signal(signal.SIGSTOP)
    fetch_id = reader.transceiver.fetch(ticket, [0], [0])
    reader.transceiver.abort(fetch_id)
    assert reader.result(fetch_id, patience_s=2).code == "cancelled"
