"""A copy that may go on writing after its deadline: the fetch ends, its blocks are nobody's until the copy lets go."""

import threading
import time

import msgspec
import pytest
from kv_nodes import LAYOUT, PATIENCE_S

from diptych.errors import TransferError
from diptych.transceiver import ticket as tickets
from diptych.transceiver.outcome import Outcome
from diptych.transceiver.quarantine import Quarantine
from diptych.transceiver.settings import QuarantineEnded
from diptych.transceiver.shm import ShmTransfer

TP2 = [msgspec.structs.replace(LAYOUT, num_kv_heads=1, tp_rank=rank, tp_size=2) for rank in range(2)]


@pytest.fixture
def let_go(monkeypatch) -> threading.Event:
    """Copies over shm pass their deadline, and linger until this is set."""
    event = threading.Event()

    def wait(self) -> None:
        raise TransferError("the transfer did not end before its deadline", code="deadline")

    def settle(self, patience_s: float) -> None:
        assert 0 < patience_s <= 30.0, "a lease's time"
        assert event.wait(PATIENCE_S)

    monkeypatch.setattr(ShmTransfer, "wait", wait)
    monkeypatch.setattr(ShmTransfer, "settle", settle)
    monkeypatch.setattr(Outcome, "lingers", property(lambda self: isinstance(self, ShmTransfer)))
    yield event
    event.set()


def end_of_quarantine(reader) -> QuarantineEnded:
    return reader.wait(lambda event: isinstance(event, QuarantineEnded))


def test_the_fetch_ends_and_the_blocks_are_named_again_when_the_copy_has_let_go(nodes, let_go):
    owner, reader = nodes(seed=1), nodes(seed=2)
    ticket_id, ticket = owner.offer([4, 5])
    failed = reader.result(reader.transceiver.fetch(ticket, [0, 1], [8, 9]))
    assert (failed.code, failed.held) == ("deadline", (8, 9)), (
        "another transport must not write there, either"
    )
    assert owner.ended(ticket_id).reason == "released"
    assert reader.transceiver.poll(time.monotonic()) == []
    let_go.set()
    assert end_of_quarantine(reader).block_ids == (8, 9)


def test_a_copy_that_lingers_beside_one_that_failed_holds_the_blocks(nodes, let_go, monkeypatch):
    owning, reader = [nodes(layout, seed=i) for i, layout in enumerate(TP2)], nodes(seed=9)
    failing = ShmTransfer.wait
    waited: list[ShmTransfer] = []

    def wait(self) -> None:
        waited.append(self)
        if len(waited) == 1:
            raise TransferError("the blocks were reused", code="stale")
        failing(self)

    monkeypatch.setattr(ShmTransfer, "wait", wait)
    monkeypatch.setattr(Outcome, "lingers", property(lambda self: self in waited[1:]))
    offers = [tickets.decode(node.offer([4, 5])[1]) for node in owning]
    ticket = tickets.encode(tickets.join(offers))
    failed = reader.result(reader.transceiver.fetch(ticket, [0, 1], [8, 9]))
    assert (failed.code, failed.held) == ("stale", (8, 9))
    let_go.set()
    assert end_of_quarantine(reader).block_ids == (8, 9)


def test_close_waits_for_it(nodes, let_go):
    owner, reader = nodes(seed=1), nodes(seed=2)
    failed = reader.result(reader.transceiver.fetch(owner.offer([4])[1], [0], [8]))
    assert failed.held == (8,)
    let_go.set()
    reader.transceiver.close()
    assert QuarantineEnded((8,)) in reader.transceiver.poll(time.monotonic())


def test_several_copies_have_the_patience_of_one():
    given: list[float] = []
    over = threading.Event()

    class Copy:
        def settle(self, patience_s: float) -> None:
            given.append(patience_s)
            before = time.monotonic()
            while time.monotonic() == before:  # it takes a moment
                pass

    quarantine = Quarantine(lambda blocks: over.set())
    quarantine.hold((1, 2), [Copy(), Copy()], 10.0)
    assert over.wait(PATIENCE_S)
    quarantine.close()
    first, second = given
    assert second < first <= 10.0
