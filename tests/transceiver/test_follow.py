"""Following a prefill from one transceiver to another: what the reader hears, in which order, and how it ends."""

import time

import msgspec
import numpy as np
import pytest
from kv_nodes import LAYOUT, PATIENCE_S

from diptych.errors import TransferError
from diptych.transceiver import ticket as tickets
from diptych.transceiver.connection import dial
from diptych.transceiver.follow import OwnerAddress
from diptych.transceiver.frames import Follow, Handed, Renew, Withdrawn
from diptych.transceiver.notices import NoticeBoard
from diptych.transceiver.settings import FetchDone, FollowEnded, PrefillHanded, PrefillProgress
from diptych.transceiver.stop import Stop


def heard(node, kind=object):
    return node.wait(lambda event: isinstance(event, kind))


def wait_followed(owner, key, *, wanted=True):
    stop = Stop(PATIENCE_S)
    while owner.transceiver.is_followed(key) is not wanted:
        stop.check()
        time.sleep(0.001)


def follow(reader, owner, key="prefill"):
    """Returns when the owner knows."""
    follow_id = reader.transceiver.follow(owner.transceiver.endpoint, key)
    wait_followed(owner, key)
    return follow_id


def show(owner, num_blocks, key="prefill", first=3):
    blocks = list(range(first, first + num_blocks))
    owner.transceiver.show_progress(key, b"what", blocks, num_blocks * LAYOUT.tokens_per_block)
    return blocks


def test_progress_is_fetched_without_a_lease_and_the_end_with_one(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    follow_id = follow(reader, owner)
    early = show(owner, 2)
    progress = heard(reader, PrefillProgress)
    assert (progress.follow_id, progress.content, progress.num_tokens) == (follow_id, b"what", 16)
    fetch_id = reader.transceiver.fetch(progress.ticket, range(2), [10, 11])
    assert isinstance(reader.result(fetch_id), FetchDone)
    assert np.array_equal(reader.blocks[[10, 11]], owner.blocks[early])
    assert owner.transceiver.metrics().open_leases == 0

    ticket_id, ticket = owner.offer([3, 4, 5])
    owner.transceiver.hand_over("prefill", b"what", ticket, b"first token")
    assert heard(reader, PrefillHanded) == PrefillHanded(follow_id, b"what", ticket, b"first token")
    fetch_id = reader.transceiver.fetch(ticket, [2], [12])
    assert isinstance(reader.result(fetch_id), FetchDone)
    assert np.array_equal(reader.blocks[12], owner.blocks[5])
    assert owner.ended(ticket_id).reason == "released"
    assert not owner.transceiver.is_followed("prefill")


def test_blocks_that_went_to_somebody_else_meanwhile_are_not_taken(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    follow(reader, owner)
    show(owner, 2)
    ticket = heard(reader, PrefillProgress).ticket
    owner.memory.generations[4] += 1
    assert reader.result(reader.transceiver.fetch(ticket, range(2), [10, 11])).code == "stale"


def test_a_reader_that_asks_late_still_gets_the_end_and_only_once(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    show(owner, 2)  # nobody listens
    owner.transceiver.hand_over("prefill", b"what", b"ticket", b"note")
    owner.transceiver.hand_over("ended", b"what", None, b"note")
    owner.transceiver.withdraw("gone", "it was cancelled")
    endpoint = owner.transceiver.endpoint
    first = reader.transceiver.follow(endpoint, "prefill")
    assert heard(reader) == PrefillHanded(first, b"what", b"ticket", b"note")
    ended = reader.transceiver.follow(endpoint, "ended")
    assert heard(reader) == PrefillHanded(ended, b"what", None, b"note")
    gone = reader.transceiver.follow(endpoint, "gone")
    assert heard(reader) == FollowEnded(gone, "it was cancelled")
    follow(reader, owner)  # nothing is known of it any more: this waits


def test_many_prefills_over_one_connection(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    ids = {follow(reader, owner, f"prefill {n}"): n for n in range(40)}
    for number in range(40):
        owner.transceiver.hand_over(f"prefill {number}", b"", None, str(number).encode())
    for _ in ids:
        event = heard(reader, PrefillHanded)
        assert event.note == str(ids[event.follow_id]).encode()


def test_what_is_no_longer_followed_is_not_heard_of(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    first, second = follow(reader, owner, "first"), follow(reader, owner, "second")
    reader.transceiver.unfollow(first)
    reader.transceiver.unfollow(first)
    wait_followed(owner, "first", wanted=False)
    owner.transceiver.hand_over("first", b"", None, b"")
    owner.transceiver.hand_over("second", b"", None, b"")
    assert heard(reader).follow_id == second


def test_follows_end_when_the_owner_does(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    ids = {follow(reader, owner, "first"), follow(reader, owner, "second")}
    owner.transceiver.close()
    assert {heard(reader, FollowEnded).follow_id for _ in ids} == ids


def test_a_reader_that_closes_hears_the_end_of_its_follows(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    follow_id = follow(reader, owner)
    reader.transceiver.close()
    assert heard(reader, FollowEnded).follow_id == follow_id
    wait_followed(owner, "prefill", wanted=False)  # its death is noticed


def test_another_process_at_the_same_address_is_not_followed(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    host, port = owner.transceiver.address
    follow_id = reader.transceiver.follow(f"{host}:{port}/yesterday", "prefill")
    event = heard(reader, FollowEnded)
    assert event.follow_id == follow_id and "yesterday" in event.message


def test_the_secret_must_be_the_same(nodes):
    owner, reader = nodes(seed=1, secret="a"), nodes(seed=2, secret="b")
    reader.transceiver.follow(owner.transceiver.endpoint, "prefill")
    assert "secret" in heard(reader, FollowEnded).message
    friend = nodes(seed=3, secret="a")
    follow(friend, owner)


def test_nobody_listens_there(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    endpoint = owner.transceiver.endpoint
    owner.transceiver.close()
    reader.transceiver.follow(endpoint, "prefill")
    assert "is gone" in heard(reader, FollowEnded).message


@pytest.mark.parametrize("endpoint", ["", "host", "host:1", "host:x/a", "host:99999/a", ":1/a", "host:1/"])
def test_an_endpoint_that_is_none_ends_the_follow(nodes, endpoint):
    reader = nodes(seed=2)
    follow_id = reader.transceiver.follow(endpoint, "prefill")
    assert heard(reader) == FollowEnded(follow_id, f"KV owner {endpoint!r} is not host:port/incarnation")


def test_endpoints_are_read_as_they_are_written():
    for address in (OwnerAddress("127.0.0.1", 80, "a1"), OwnerAddress("fe80::1", 65535, "b")):
        assert OwnerAddress.parse(str(address)) == address
    with pytest.raises(TransferError):
        OwnerAddress.parse("127.0.0.1:0/a")


def test_nonsense_on_the_connection_costs_its_sender_the_connection_only(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    follow(reader, owner)
    incarnation, stop = owner.memory.identity.incarnation, Stop(PATIENCE_S)
    rude = dial(owner.transceiver.address, "notices", incarnation, None, stop)
    rude.send(Follow("rude"), stop)
    rude.send(Renew(["x"]), stop)
    assert rude.wait_readable(PATIENCE_S)
    with pytest.raises(OSError, match=r"closed|reset"):
        rude.receive(stop)
    rude.close()
    owner.transceiver.hand_over("prefill", b"", None, b"")
    assert heard(reader, PrefillHanded)


def test_ends_that_nobody_asks_for_are_forgotten_oldest_first():
    board = NoticeBoard(1.0, capacity=2)
    for key in ("a", "b", "c"):
        board.end(Withdrawn(key, key))
    assert list(board._ends) == ["b", "c"]


def test_a_ticket_that_fits_no_frame_is_withdrawn():
    board = NoticeBoard(1.0)
    board.end(Handed("a", b"", b"x" * (1 << 20), b""))
    assert board._ends["a"] == Withdrawn("a", "its ticket has 1048576 bytes")


def test_a_ticket_without_a_lease_says_so(nodes):
    owner, reader = nodes(seed=1), nodes(seed=2)
    follow(reader, owner)
    show(owner, 2)
    ticket = tickets.decode(heard(reader, PrefillProgress).ticket)
    assert ticket.ticket_id == "" and len(ticket.digests) == 2
    assert msgspec.structs.replace(ticket, ticket_id="x").first_rank().ticket_id == "x"
