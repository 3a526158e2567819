"""Over every transport: what is stale, corrupt, foreign or nonsense fails with a typed error, and alone."""

import msgspec
import pytest
from kv_nodes import LAYOUT, WIDE, Gate, forge

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
