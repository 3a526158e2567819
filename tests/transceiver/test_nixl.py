"""A nixl read that cannot end, because a frozen owner is needed for it: the fetch ends, its blocks stay set aside."""

import json
import signal

import numpy as np
import pytest
from kv_nodes import WIDE, needs_package

from diptych.transceiver import ticket as tickets
from diptych.transceiver.nixl.peer import NixlPeer
from diptych.transceiver.settings import FetchDone, FetchFailed, QuarantineEnded
from diptych.transceiver.stop import Stop

pytestmark = needs_package("nixl")
BLOCKS = tuple(range(48))


@pytest.fixture
def frozen(processes, nodes, monkeypatch):
    """An owner that was frozen in the first moments of an acquaintance, and a reader whose fetch was given up."""
    settings = {"backends": ["nixl"], "measure_transports": False}
    owner = processes("wide", "48", "7", json.dumps(settings))
    reader = nodes(WIDE, num_blocks=48, seed=2, backends=("nixl",), timeout_s=1.0, lease_s=3.0)
    with monkeypatch.context() as unproven:
        unproven.setattr(NixlPeer, "prove", lambda self, proof, stop: None)
        ticket_id, ticket = owner.offer(list(BLOCKS))
        region = tickets.decode(ticket).transports["nixl"]
        reader.transceiver._ways.transports["nixl"].connect(region, Stop(5))
        owner.signal(signal.SIGSTOP)
        failed = reader.result(reader.transceiver.fetch(ticket, BLOCKS, BLOCKS))
    assert isinstance(failed, FetchFailed)
    assert (failed.code, failed.held) == ("deadline", BLOCKS)
    return owner, reader, ticket_id


def end_of_quarantine(reader) -> QuarantineEnded:
    return reader.wait(lambda event: isinstance(event, QuarantineEnded))


def test_it_ends_when_the_owner_goes_on(frozen):
    owner, reader, _ = frozen
    owner.signal(signal.SIGCONT)
    assert end_of_quarantine(reader).block_ids == BLOCKS


def test_it_ends_when_the_owner_dies(frozen):
    owner, reader, _ = frozen
    owner.signal(signal.SIGKILL)
    assert end_of_quarantine(reader).block_ids == BLOCKS


def test_it_ends_after_a_leases_time_and_nothing_lands_later(frozen):
    owner, reader, ticket_id = frozen
    assert end_of_quarantine(reader).block_ids == BLOCKS
    reader.blocks[:] = 7  # they are somebody else's now
    owner.signal(signal.SIGCONT)
    assert owner.hear("ended")["ended"] == ticket_id
    again = reader.result(reader.transceiver.fetch(owner.offer([3])[1], [0], [0]))
    assert isinstance(again, FetchDone), again
    assert np.all(reader.blocks[1:] == 7)


def test_closing_ends_it(frozen):
    _, reader, _ = frozen
    reader.transceiver.close()
    assert end_of_quarantine(reader).block_ids == BLOCKS
