"""Tickets survive the trip, and anything else is refused in one sentence."""

import msgspec
import pytest
from kv_nodes import LAYOUT, forge

from diptych.errors import TransferError
from diptych.transceiver import ticket as tickets
from diptych.transceiver.ticket import Ticket


@pytest.fixture
def ticket() -> Ticket:
    return Ticket(
        ticket_id=tickets.new_ticket_id(),
        incarnation="me",
        layout=LAYOUT,
        fingerprint=LAYOUT.fingerprint(),
        num_tokens=17,
        block_ids=[5, 3, 9],
        generations=[1, 0, 2**64 - 1],
        digests=[0, 2**64 - 1, 7],
        host="127.0.0.1",
        port=4242,
        transports={"shm": b"\x00\xff", "tcp": b""},
        lease_s=30.0,
    )


def test_round_trip(ticket: Ticket):
    assert tickets.decode(tickets.encode(ticket)) == ticket


def test_ids_are_128_random_bits():
    ids = {tickets.new_ticket_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(bytes.fromhex(ticket_id)) == 16 for ticket_id in ids)


def test_another_version_is_refused_before_its_fields_are_read(ticket: Ticket):
    later = msgspec.msgpack.encode({"version": 2, "blocks": "in another form"})
    with pytest.raises(TransferError, match="version 2, this worker reads 1") as caught:
        tickets.decode(later)
    assert caught.value.code == "layout"


@pytest.mark.parametrize("change", [{"generations": [1]}, {"digests": [1]}, {"fingerprint": "0" * 16}])
def test_fields_that_contradict_each_other_are_refused(ticket: Ticket, change: dict[str, object]):
    with pytest.raises(TransferError) as caught:
        tickets.decode(forge(tickets.encode(ticket), **change))
    assert caught.value.code == "layout"


def test_every_truncation_is_refused(ticket: Ticket):
    data = tickets.encode(ticket)
    for length in range(len(data)):
        with pytest.raises(TransferError):
            tickets.decode(data[:length])
