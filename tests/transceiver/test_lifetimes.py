"""Over every transport: leases last as long as their fetch, and nothing is left behind."""

import logging
import threading
import time

import pytest
from conformance import collected_footprint, footprint, wait_until
from kv_nodes import Gate, Node

from diptych.transceiver.settings import FetchDone


def test_a_long_fetch_renews_its_lease(nodes, gate: Gate, transport):
    owner = nodes(seed=1, backends=(transport,), lease_s=1.0)  # a first connection may take half of it
    reader = nodes(seed=2, backends=(transport,))
    ticket_id, ticket = owner.offer([1])
    fetch_id = reader.transceiver.fetch(ticket, [0], [0])
    gate.wait()
    limit = time.monotonic() + 3.3  # more than three leases
    with pytest.raises(AssertionError, match="no such event"):
        owner.ended(ticket_id, patience_s=limit - time.monotonic())
    gate.open.set()
    assert isinstance(reader.result(fetch_id), FetchDone)
    assert owner.ended(ticket_id).reason == "released"


def test_nothing_grows(nodes, transport):
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))

    def fetch_many(count: int) -> None:
        for i in range(count // 4):
            offers = [owner.offer([4 * j, 4 * j + 2]) for j in range(4)]
            fetches = [
                reader.transceiver.fetch(ticket, [0, 1], [2 * j, 2 * j + 1])
                for j, (_, ticket) in enumerate(offers)
            ]
            if i % 5 == 0:
                reader.transceiver.abort(fetches[0])
            for fetch_id in fetches:
                reader.result(fetch_id)
            for ticket_id, _ in offers:
                owner.ended(ticket_id)

    fetch_many(40)
    before = footprint()
    fetch_many(300)
    # Kept threads and connections come and go with the overlap of fetches; a leak would be some 300.
    wait_until(lambda: all(x <= y + 20 for x, y in zip(footprint(), before, strict=True)), f"{before} grew")
    assert reader.transceiver.metrics().open_fetches == 0
    assert owner.transceiver.metrics().open_leases == 0


def test_close_leaves_nothing(transport):
    before = collected_footprint()
    for seed in range(3):
        owner = Node(seed=seed, backends=(transport,))
        reader = Node(seed=seed + 10, backends=(transport,))
        reader.result(reader.transceiver.fetch(owner.offer([1])[1], [0], [0]))
        reader.close()
        owner.close()
    wait_until(lambda: all(x <= y for x, y in zip(footprint(), before, strict=True)), f"{before} grew")


def test_close_in_the_middle_of_a_fetch(nodes, gate: Gate, transport, caplog):
    caplog.set_level(logging.ERROR)
    owner, reader = nodes(seed=1, backends=(transport,)), Node(seed=2, backends=(transport,))
    ticket_id, ticket = owner.offer([1, 2])
    reader.transceiver.fetch(ticket, [0, 1], [0, 1])
    gate.wait()
    closing = threading.Thread(target=reader.close)
    closing.start()
    gate.open.set()
    closing.join(timeout=5)
    assert not closing.is_alive()
    assert owner.ended(ticket_id).reason in ("released", "peer_gone")
    assert not caplog.records
