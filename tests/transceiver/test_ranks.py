"""A reader whose layout is another than the owner's gets its part of every block, from as many ranks as it needs."""

import msgspec
import numpy as np
import pytest
from kv_nodes import HAS_GPU, Way, needs_package

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver import ticket as tickets
from diptych.transceiver.owners import choose_parts
from diptych.transceiver.plan import plan_copy
from diptych.transceiver.settings import FetchDone
from diptych.transceiver.shm import ShmTransfer, ShmTransport

WHOLE = KvLayout(num_layers=4, num_kv_heads=4, head_dim=16, tokens_per_block=8, model="tiny")
TP2 = [
    msgspec.structs.replace(WHOLE, num_kv_heads=2, total_kv_heads=4, tp_rank=rank, tp_size=2)
    for rank in range(2)
]
PP2 = [
    msgspec.structs.replace(WHOLE, num_layers=3, pp_rank=0, pp_size=2),
    msgspec.structs.replace(WHOLE, num_layers=1, first_layer=3, pp_rank=1, pp_size=2),
]
WAYS = [
    Way("shm"),
    Way("tcp"),
    *(pytest.param(Way(name), id=name, marks=needs_package(name)) for name in ("nixl", "ucx")),
    *(
        pytest.param(
            Way.on_gpu(name),
            id=f"{name} on a GPU",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")],
        )
        for name in ("cuda_ipc", "tcp")
    ),
]
NUM_TOKENS = 83  # the last block is not full
SOURCE = [9, 3, 4, 5, 30, 1, 0, 22, 11, 12, 13]


def offer(nodes) -> tuple[list[str], bytes]:
    offers = [node.transceiver.offer(SOURCE, NUM_TOKENS) for node in nodes]
    joined = tickets.join([tickets.decode(ticket) for _, ticket in offers])
    return [ticket_id for ticket_id, _ in offers], tickets.encode(joined)


@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize(
    ("owners", "reader"),
    [
        pytest.param(TP2, WHOLE, id="TP2 to TP1"),
        pytest.param([WHOLE], TP2[1], id="TP1 to TP2"),
        pytest.param(PP2, WHOLE, id="PP2 to PP1"),
        pytest.param([WHOLE], PP2[0], id="PP1 to PP2"),
        pytest.param(TP2, TP2[1], id="TP2 to TP2"),
        pytest.param([WHOLE], msgspec.structs.replace(WHOLE, tokens_per_block=16), id="8 to 16 tokens"),
        pytest.param(TP2, msgspec.structs.replace(WHOLE, tokens_per_block=4), id="TP2 to TP1, 8 to 4 tokens"),
    ],
)
def test_fetch_between_layouts(nodes, transport, owners, reader):
    owning = [nodes(layout, seed=i, backends=(transport,)) for i, layout in enumerate(owners)]
    reading = nodes(reader, num_blocks=64, seed=9, backends=(transport,))
    count = -(-NUM_TOKENS // reader.tokens_per_block)
    blocks = np.random.default_rng(0).permutation(64)[: count - 1].tolist()
    expected = np.array(reading.blocks)
    for part in choose_parts(owners, reader):
        plan = plan_copy(
            owners[part.owner], reader, SOURCE, range(1, count), blocks, num_tokens=NUM_TOKENS, part=part
        )
        spans, theirs = plan.spans(), np.array(owning[part.owner].blocks).reshape(-1)
        for source, end, length in zip(
            spans.source_offset, spans.destination_offset, spans.length, strict=True
        ):
            expected.reshape(-1)[end : end + length] = theirs[source : source + length]
    _, ticket = offer(owning)

    done = reading.result(reading.transceiver.fetch(ticket, range(1, count), blocks))

    assert isinstance(done, FetchDone), done
    assert done.transport == transport
    assert np.array_equal(np.array(reading.blocks), expected)


def test_every_rank_gets_its_blocks_back(nodes):
    owning = [nodes(layout, seed=i) for i, layout in enumerate(TP2)]
    reading = nodes(WHOLE, seed=9)
    ids, ticket = offer(owning)
    assert isinstance(reading.result(reading.transceiver.fetch(ticket, range(11), range(11))), FetchDone)
    assert [node.ended(ticket_id).reason for node, ticket_id in zip(owning, ids, strict=True)] == [
        "released"
    ] * 2


def test_a_rank_that_is_missing_fails_the_fetch_and_frees_the_others(nodes):
    owner, reading = nodes(TP2[0], seed=0), nodes(WHOLE, seed=9)
    (ticket_id,), ticket = offer([owner])
    failed = reading.result(reading.transceiver.fetch(ticket, range(11), range(11)))
    assert failed.code == "layout"
    assert "KV heads 0 to 3 once" in failed.message
    assert owner.ended(ticket_id).reason == "released"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
def test_digests_of_blocks_that_are_read_whole_are_checked_though_they_are_cut(nodes):
    way = Way.on_gpu("cuda_ipc")
    owning = [nodes(layout, seed=i, backends=(way,)) for i, layout in enumerate(TP2)]
    reading = nodes(WHOLE, num_blocks=64, seed=9, backends=(way,))
    _, ticket = offer(owning)
    owning[1].blocks[SOURCE[4], 17] ^= 1
    failed = reading.result(reading.transceiver.fetch(ticket, range(11), range(11)))
    assert failed.code == "corrupt", failed
    assert "1 of 11 blocks" in failed.message


@pytest.fixture
def halves(nodes):
    """A reader, and a ticket of two ranks that each hold half of what it wants."""
    owning = [nodes(layout, seed=i, backends=("shm", "tcp")) for i, layout in enumerate(TP2)]
    reader = nodes(WHOLE, num_blocks=64, seed=9, backends=("shm", "tcp"))
    return reader, owning


def fetch(reader, owning):
    ticket_ids, ticket = offer(owning)
    done = reader.result(reader.transceiver.fetch(ticket, range(len(SOURCE)), range(len(SOURCE))))
    for node, ticket_id in zip(owning, ticket_ids, strict=True):
        assert node.ended(ticket_id).reason == "released"
    return done


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    made: list[str] = []
    starting, waiting, aborting = ShmTransport.start, ShmTransfer.wait, ShmTransfer.abort

    def start(self, *args):
        made.append("start")
        return starting(self, *args)

    def wait(self) -> None:
        made.append("wait")
        waiting(self)

    def abort(self) -> None:
        made.append("abort")
        aborting(self)

    monkeypatch.setattr(ShmTransport, "start", start)
    monkeypatch.setattr(ShmTransfer, "wait", wait)
    monkeypatch.setattr(ShmTransfer, "abort", abort)
    return made


def test_all_ranks_copies_start_before_the_first_is_waited_for(halves, calls):
    done = fetch(*halves)
    assert isinstance(done, FetchDone), done
    assert calls == ["start", "start", "wait", "wait"]
    assert done.bytes == sum(len(SOURCE) * layout.block_bytes for layout in TP2)
    assert 0 < done.wire_s <= done.total_s


def test_a_copy_that_fails_takes_the_others_with_it(halves, calls):
    reader, owning = halves
    _, ticket = offer(owning)
    owning[0].memory.generations[SOURCE[2]] += 1
    owning[1].memory.generations[SOURCE[2]] += 1
    failed = reader.result(reader.transceiver.fetch(ticket, range(len(SOURCE)), range(len(SOURCE))))
    assert failed.code == "stale"
    assert calls == ["start", "start", "wait", "abort", "wait"], "the second one is waited for all the same"


def test_one_rank_may_need_another_transport(halves, calls, monkeypatch):
    reader, owning = halves
    waiting = ShmTransfer.wait

    def wait(self) -> None:
        if calls.count("wait"):
            raise TransferError("its memory is gone", code="peer_gone")
        waiting(self)

    monkeypatch.setattr(ShmTransfer, "wait", wait)
    done = fetch(reader, owning)
    assert isinstance(done, FetchDone), done
    assert done.transport == "shm+tcp"
