"""Every transport brings the exact bytes, whatever blocks are asked for, and no others."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_nodes import LAYOUT, Node

from diptych.transceiver import stream
from diptych.transceiver import ticket as tickets
from diptych.transceiver.settings import FetchDone


def test_permuted_blocks_arrive_exactly(nodes, transport):
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    rng = np.random.default_rng(3)
    source, destination = rng.permutation(32)[:20].tolist(), rng.permutation(32)[:20].tolist()
    untouched = np.setdiff1d(np.arange(32), destination)
    before = reader.blocks[untouched].copy()
    ticket_id, ticket = owner.offer(source)

    done = reader.result(reader.transceiver.fetch(ticket, range(20), destination))

    assert isinstance(done, FetchDone), done
    assert done.transport == transport
    assert done.bytes == 20 * LAYOUT.block_bytes
    assert 0 < done.wire_s <= done.total_s
    assert np.array_equal(reader.blocks[destination], owner.blocks[source])
    assert np.array_equal(reader.blocks[untouched], before)
    ended = owner.ended(ticket_id)
    assert (ended.reason, ended.block_ids) == ("released", tuple(source))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_selection_of_blocks(nodes, pairs, transport, data):
    owner, reader = pairs(transport)
    source = data.draw(st.lists(st.integers(0, 31), unique=True, max_size=32))
    indices = data.draw(st.lists(st.sampled_from(range(len(source))), max_size=24)) if source else []
    destination = data.draw(st.permutations(range(32)))[: len(indices)]
    _, ticket = owner.offer(source)
    done = reader.result(reader.transceiver.fetch(ticket, indices, destination))
    assert isinstance(done, FetchDone), done
    expected = owner.blocks[[source[i] for i in indices]]
    assert np.array_equal(reader.blocks[list(destination)], expected)


@pytest.fixture
def pairs(nodes):
    known: dict[str, tuple[Node, Node]] = {}

    def pair(transport: str) -> tuple[Node, Node]:
        if transport not in known:
            known[transport] = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
        return known[transport]

    return pair


def test_a_cached_prefix_is_not_fetched(nodes, transport):
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer([4, 5, 6, 20])
    done = reader.result(reader.transceiver.fetch(ticket, [2, 3], [0, 9]))
    assert done.bytes == 2 * LAYOUT.block_bytes
    assert np.array_equal(reader.blocks[[0, 9]], owner.blocks[[6, 20]])


def test_a_fetch_of_nothing_releases_the_ticket(nodes, transport):
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    ticket_id, ticket = owner.offer([1, 2])
    done = reader.result(reader.transceiver.fetch(ticket, [], []))
    assert (done.bytes, done.transport) == (0, "")
    assert owner.ended(ticket_id).reason == "released"


def test_more_spans_than_one_request_holds(nodes, monkeypatch, transport):
    monkeypatch.setattr(stream, "MAX_SPANS", 3)
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer(list(range(0, 32, 2)))
    done = reader.result(reader.transceiver.fetch(ticket, range(16), range(16)))
    assert isinstance(done, FetchDone), done
    assert np.array_equal(reader.blocks[:16], owner.blocks[::2])


def test_concurrent_fetches(nodes, transport):
    owner = nodes(num_blocks=64, seed=1, backends=(transport,))
    reader = nodes(num_blocks=64, seed=2, backends=(transport,))
    offers = [owner.offer([63 - 4 * i - j for j in range(4)]) for i in range(16)]
    fetches = [
        reader.transceiver.fetch(ticket, range(4), range(4 * i, 4 * i + 4))
        for i, (_, ticket) in enumerate(offers)
    ]
    assert all(isinstance(reader.result(fetch_id), FetchDone) for fetch_id in fetches)
    assert np.array_equal(reader.blocks, owner.blocks[::-1])
    assert {owner.ended(ticket_id).reason for ticket_id, _ in offers} == {"released"}
    assert reader.transceiver.metrics().fetches_by_transport == {transport: 16}
    assert owner.transceiver.metrics().open_leases == 0


def test_a_worker_fetches_from_itself(nodes, transport):
    node = nodes(seed=1, backends=(transport,))
    ticket_id, ticket = node.offer([3, 1])
    assert isinstance(node.result(node.transceiver.fetch(ticket, [0, 1], [10, 11])), FetchDone)
    assert np.array_equal(node.blocks[[10, 11]], node.blocks[[3, 1]])
    assert node.ended(ticket_id).reason == "released"


def test_digests_can_be_left_out(nodes, transport):
    owner = nodes(seed=1, backends=(transport,), verify_digest=False)
    reader = nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer([4, 5])
    assert tickets.decode(ticket).digests == []
    assert isinstance(reader.result(reader.transceiver.fetch(ticket, [0, 1], [0, 1])), FetchDone)
    assert np.array_equal(reader.blocks[:2], owner.blocks[4:6])
