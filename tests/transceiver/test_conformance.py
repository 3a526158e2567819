"""Every transport does the same: exact bytes, or one typed failure, and never anything left behind."""

import gc
import json
import logging
import os
import signal
import threading
import time

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_nodes import HAS_GPU, LAYOUT, WIDE, Gate, Node, Way, forge, needs_package

from diptych.kv_layout import KvLayout
from diptych.transceiver import stream
from diptych.transceiver import ticket as tickets
from diptych.transceiver.host_region import HostRegion
from diptych.transceiver.settings import FetchDone, FetchFailed
from diptych.transceiver.wires import StreamRegion

REGIONS = {
    "shm": HostRegion,
    "cuda_ipc": HostRegion,
    "tcp": StreamRegion,
    "nixl": StreamRegion,
    "ucx": StreamRegion,
}
ONE_SIDED = ("shm", "cuda_ipc")  # the owner's process takes no part at all
WAYS = [
    Way("shm"),
    Way("tcp"),
    *(pytest.param(Way(name), id=name, marks=needs_package(name)) for name in ("nixl", "ucx")),
    *(
        pytest.param(
            Way.on_gpu(name),
            id=f"{name} on a GPU",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not HAS_GPU, reason="there is no GPU"),
                needs_package(name),
            ],
        )
        for name in ("cuda_ipc", "tcp", "nixl", "ucx")
    ),
]


@pytest.fixture(params=WAYS)
def transport(request) -> str:
    way = request.param
    if way == "nixl" and way.device == "cuda" and "processes" not in request.fixturenames:
        pytest.skip("UCX does not connect two pools on GPUs within one process")
    return way


def owner_process(processes, transport: str, layout: str = "wide", num_blocks: int = 48, **options):
    settings = {"backends": [transport], "measure_transports": False, "device": transport.device, **options}
    return processes(layout, str(num_blocks), "7", json.dumps(settings))


def bytes_of(layout: KvLayout, num_blocks: int, seed: int) -> np.ndarray:
    words = np.random.default_rng(seed).integers(0, 2**64, num_blocks * layout.block_bytes // 8, np.uint64)
    return words.view(np.uint8).reshape(num_blocks, layout.block_bytes)


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


def test_a_reused_block_is_stale(nodes, transport):
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer([4, 5, 6])
    owner.memory.generations[5] += 1
    failed = reader.result(reader.transceiver.fetch(ticket, [0, 1, 2], [0, 1, 2]))
    assert failed.code == "stale"
    # A block that the reader does not ask for may be reused.
    assert isinstance(reader.result(reader.transceiver.fetch(ticket, [0, 2], [0, 1])), FetchDone)


def test_a_block_reused_during_the_copy_is_stale(nodes, gate: Gate, transport):
    owner = nodes(WIDE, num_blocks=48, seed=1, backends=(transport,))
    reader = nodes(WIDE, num_blocks=48, seed=2, backends=(transport,))
    _, ticket = owner.offer(list(range(48)))
    fetch_id = reader.transceiver.fetch(ticket, range(48), range(48))
    gate.wait()
    owner.memory.generations[0] += 1
    gate.open.set()
    assert reader.result(fetch_id).code == "stale"


def test_a_flipped_bit_is_corrupt(nodes, transport):
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    ticket_id, ticket = owner.offer([4, 5])
    owner.blocks[5, -1] ^= 1
    assert reader.result(reader.transceiver.fetch(ticket, [0, 1], [0, 1])).code == "corrupt"
    assert owner.ended(ticket_id).reason == "released"
    assert reader.transceiver.metrics().failures == {"corrupt": 1}


def test_digests_can_be_left_out(nodes, transport):
    owner = nodes(seed=1, backends=(transport,), verify_digest=False)
    reader = nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer([4, 5])
    assert tickets.decode(ticket).digests == []
    assert isinstance(reader.result(reader.transceiver.fetch(ticket, [0, 1], [0, 1])), FetchDone)
    assert np.array_equal(reader.blocks[:2], owner.blocks[4:6])


def test_another_incarnation_is_refused(nodes, transport):
    """What answers at the address is not the process that made the ticket: a restart, a recycled pid."""
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer([4, 5])
    region = msgspec.msgpack.decode(tickets.decode(ticket).transports[transport], type=REGIONS[transport])
    identity = msgspec.structs.replace(region.identity, incarnation="the-one-before")
    before = msgspec.msgpack.encode(msgspec.structs.replace(region, identity=identity))
    forged = forge(ticket, incarnation="the-one-before", transports={transport: before})
    failed = reader.result(reader.transceiver.fetch(forged, [0], [0]))
    assert (type(failed), failed.code) == (FetchFailed, "peer_gone")


def test_another_layout_is_refused(nodes, transport):
    owner = nodes(seed=1, backends=(transport,))
    reader = nodes(msgspec.structs.replace(LAYOUT, model="other"), seed=2, backends=(transport,))
    ticket_id, ticket = owner.offer([4, 5])
    failed = reader.result(reader.transceiver.fetch(ticket, [0], [0]))
    assert failed.code == "layout"
    assert "model is 'tiny' there and 'other' here" in failed.message
    assert owner.ended(ticket_id).reason == "released"


@pytest.mark.parametrize("ticket", [b"", b"\xc1garbage", b"x" * 100])
def test_what_is_no_ticket_fails_alone(nodes, transport, ticket):
    node = nodes(seed=1, backends=(transport,))
    assert node.result(node.transceiver.fetch(ticket, [0], [0])).code == "layout"


@pytest.mark.parametrize(
    ("indices", "blocks"), [([2], [0]), ([-1], [0]), ([0, 1], [0]), ([0, 1], [3, 3]), ([0], [32])]
)
def test_wrong_block_lists_fail_alone(nodes, transport, indices, blocks):
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer([4, 5])
    assert reader.result(reader.transceiver.fetch(ticket, indices, blocks)).code == "layout"


def test_a_ticket_of_blocks_outside_the_pool_fails_alone(nodes, transport):
    owner, reader = nodes(seed=1, backends=(transport,)), nodes(seed=2, backends=(transport,))
    _, ticket = owner.offer([4])
    assert reader.result(reader.transceiver.fetch(forge(ticket, block_ids=[99]), [0], [0])).code == "layout"


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
    owner = owner_process(processes, transport)
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
    assert owner.hear("ended") == {"ended": ticket_id, "reason": "released"}
    again = reader.transceiver.fetch(owner.offer([3])[1], [0], [0])
    assert isinstance(reader.result(again), FetchDone)
    assert np.all(reader.blocks[1:] == 7), "the fetch that was given up still writes"


def test_abort_of_a_fetch_from_a_stopped_owner(processes, nodes):
    owner = owner_process(processes, Way("tcp"), "tiny")
    reader = nodes(seed=2, backends=("tcp",), timeout_s=60.0)
    _, ticket = owner.offer([1])
    owner.signal(signal.SIGSTOP)
    fetch_id = reader.transceiver.fetch(ticket, [0], [0])
    reader.transceiver.abort(fetch_id)
    assert reader.result(fetch_id, patience_s=2).code == "cancelled"


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


def test_a_long_fetch_renews_its_lease(nodes, gate: Gate, transport):
    owner = nodes(seed=1, backends=(transport,), lease_s=0.3)
    reader = nodes(seed=2, backends=(transport,))
    ticket_id, ticket = owner.offer([1])
    fetch_id = reader.transceiver.fetch(ticket, [0], [0])
    gate.wait()
    limit = time.monotonic() + 1.0  # more than three leases
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


def footprint() -> tuple[int, ...]:
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:diptych" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), mapped


def collected_footprint() -> tuple[int, ...]:
    """Without what failures of earlier tests still hold."""
    gc.collect()
    return footprint()


def wait_until(condition, complaint: str) -> None:
    limit = time.monotonic() + 5
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < limit, f"{complaint}; now {footprint()}"
        pause.wait(0.01)
