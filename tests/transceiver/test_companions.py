"""An engine of several ranks: the first one leases and tells, all of them copy."""

import threading
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from kv_nodes import PATIENCE_S, Node

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver import ticket as tickets
from diptych.transceiver.plan import plan_copy
from diptych.transceiver.settings import FetchDone, FetchFailed
from diptych.transceiver.ticket import OwnerRank, Ticket

WHOLE = KvLayout(num_layers=4, num_kv_heads=4, head_dim=16, tokens_per_block=8, model="tiny")
RANKS = [
    msgspec.structs.replace(WHOLE, num_kv_heads=2, total_kv_heads=4, tp_rank=rank, tp_size=2)
    for rank in range(2)
]
NUM_TOKENS = 44
SOURCE = [9, 3, 30, 1, 0, 22]
DESTINATION = [5, 6, 7, 2, 1, 31]


@dataclass
class Second:
    """The other rank of an engine, in this process. Its part of a fetch ends when `may_end` is set."""

    node: Node
    may_end: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    forgotten: dict[str, threading.Event] = field(default_factory=dict)
    failure: TransferError | None = None
    fetch_id: int = 0

    def __post_init__(self) -> None:
        self.may_end.set()

    def owners(self, block_ids, num_tokens) -> list[OwnerRank]:
        return [self.node.transceiver.owner(block_ids, num_tokens)]

    def fetch(self, ticket: Ticket, source_indices, destination_blocks) -> "Second":
        data = tickets.encode(tickets.without_leases(ticket))
        self.fetch_id = self.node.transceiver.fetch(data, source_indices, destination_blocks)
        self.began.set()
        return self

    def abort(self) -> None:
        self.node.transceiver.abort(self.fetch_id)
        self.may_end.set()

    def join(self) -> int:
        event = self.node.result(self.fetch_id)
        assert self.may_end.wait(PATIENCE_S)
        if self.failure is not None:
            raise self.failure
        if isinstance(event, FetchFailed):  # aborted before it was over
            raise TransferError(event.message, code=event.code)
        return event.bytes

    def forget(self, incarnation: str) -> None:
        self.node.transceiver.forget(incarnation)
        self.forgotten.setdefault(incarnation, threading.Event()).set()


@pytest.fixture
def engine(nodes):
    """`engine(seed)` is an engine of two ranks: the first one's node, and the second."""

    def make(seed: int) -> tuple[Node, Second]:
        second = Second(nodes(RANKS[1], num_blocks=40, seed=seed + 100))
        return nodes(RANKS[0], num_blocks=40, seed=seed, companions=second), second

    return make


def offer(node: Node) -> tuple[str, bytes]:
    return node.transceiver.offer(SOURCE, NUM_TOKENS)


def test_a_ticket_names_every_rank_and_one_lease(engine):
    first, second = engine(1)
    ticket_id, data = offer(first)
    ticket = tickets.decode(data)
    assert [rank.ticket_id for rank in ticket.owners] == [ticket_id, ""]
    assert [rank.incarnation for rank in ticket.owners] == [
        node.memory.identity.incarnation for node in (first, second.node)
    ]
    assert all(len(rank.digests) == len(SOURCE) for rank in ticket.owners)


def test_two_ranks_read_two_ranks(engine):
    (owner, other_owner), (reader, other_reader) = engine(1), engine(2)
    ticket_id, ticket = offer(owner)
    done = reader.result(reader.transceiver.fetch(ticket, range(6), DESTINATION))
    assert isinstance(done, FetchDone), done
    assert done.bytes == 2 * len(SOURCE) * RANKS[0].block_bytes
    assert owner.ended(ticket_id).reason == "released"
    for source, target in ((owner, reader), (other_owner.node, other_reader.node)):
        assert np.array_equal(target.blocks[DESTINATION], source.blocks[SOURCE])


def test_two_ranks_read_one(nodes, engine):
    owner, (reader, second) = nodes(WHOLE, num_blocks=40, seed=3), engine(4)
    expected = []
    for node in (reader, second.node):
        blocks = np.array(node.blocks)
        plan = plan_copy(WHOLE, node.layout, SOURCE, range(6), DESTINATION, num_tokens=NUM_TOKENS)
        spans, theirs = plan.spans(), owner.blocks.reshape(-1)
        for start, end, length in zip(
            spans.source_offset, spans.destination_offset, spans.length, strict=True
        ):
            blocks.reshape(-1)[end : end + length] = theirs[start : start + length]
        expected.append(blocks)
    ticket_id, ticket = offer(owner)
    assert isinstance(reader.result(reader.transceiver.fetch(ticket, range(6), DESTINATION)), FetchDone)
    assert owner.ended(ticket_id).reason == "released"
    for node, blocks in zip((reader, second.node), expected, strict=True):
        assert np.array_equal(node.blocks, blocks)


def test_the_lease_is_held_until_the_last_rank_has_read(engine):
    (owner, _), (reader, second) = engine(1), engine(2)
    second.may_end.clear()
    ticket_id, ticket = offer(owner)
    fetch_id = reader.transceiver.fetch(ticket, range(6), DESTINATION)
    assert second.began.wait(PATIENCE_S)
    assert owner.transceiver.metrics().open_leases == 1
    second.may_end.set()
    assert isinstance(reader.result(fetch_id), FetchDone)
    assert owner.ended(ticket_id).reason == "released"


def test_a_rank_that_fails_fails_the_fetch_and_returns_the_lease(engine):
    (owner, _), (reader, second) = engine(1), engine(2)
    second.failure = TransferError("its blocks were reused", code="stale")
    ticket_id, ticket = offer(owner)
    failed = reader.result(reader.transceiver.fetch(ticket, range(6), DESTINATION))
    assert (failed.code, failed.message) == ("stale", "its blocks were reused")
    assert owner.ended(ticket_id).reason == "released"


def test_when_the_first_rank_fails_the_others_let_go_first(engine):
    (owner, _), (reader, second) = engine(1), engine(2)
    second.may_end.clear()  # until it is aborted
    _, ticket = offer(owner)
    owner.memory.generations[SOURCE[0]] += 1
    failed = reader.result(reader.transceiver.fetch(ticket, range(6), DESTINATION))
    assert failed.code == "stale"
    assert second.may_end.is_set()


def test_an_abort_reaches_every_rank(engine):
    (owner, _), (reader, second) = engine(1), engine(2)
    second.may_end.clear()
    second.failure = TransferError("it was aborted", code="cancelled")
    _, ticket = offer(owner)
    fetch_id = reader.transceiver.fetch(ticket, range(6), DESTINATION)
    assert second.began.wait(PATIENCE_S)
    reader.transceiver.abort(fetch_id)
    assert reader.result(fetch_id).code == "cancelled"


def test_all_ranks_forget_an_owner_that_is_gone(engine):
    (owner, other), (reader, second) = engine(1), engine(2)
    _, ticket = offer(owner)
    assert isinstance(reader.result(reader.transceiver.fetch(ticket, range(6), DESTINATION)), FetchDone)
    gone = [node.memory.identity.incarnation for node in (owner, other.node)]
    told = [second.forgotten.setdefault(incarnation, threading.Event()) for incarnation in gone]
    owner.transceiver.close()
    assert all(event.wait(PATIENCE_S) for event in told)
