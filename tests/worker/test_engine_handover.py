"""The step loop at both ends of a prefill that is followed: what its reader is told, and a leg that waits for it."""

import msgspec
import pytest
from engine_fakes import run, submit

from diptych.transceiver.settings import FetchDone, FetchFailed, PrefillHanded, PrefillProgress
from diptych.wire import Abort, TokenEvent
from diptych.worker.sequence import content_hash

LONG = tuple(range(1, 43))  # three steps of sixteen tokens
CONTEXT_LEG = {"request_type": "context_only", "handover_key": "k"}


def test_a_followed_prefill_is_told_chunk_by_chunk_in_full_blocks(parts):
    engine, link, transceiver, scheduler = parts
    transceiver.followers.add("k")
    run(engine, link, submit(prompt=LONG, **CONTEXT_LEG))
    content = content_hash(list(LONG), "")
    *progress, end = transceiver.notices
    ((offered, _),) = transceiver.offers
    assert progress == [("k", content, offered[:4], 16), ("k", content, offered[:8], 32)]
    assert end == ("k", content, b"ticket", [42], None)
    scheduler.check()


def test_what_the_prefix_cache_holds_is_told_before_the_first_step(parts):
    engine, link, transceiver, _ = parts
    transceiver.followers.add("k")
    run(engine, link, submit("before", prompt=LONG[:17]), submit(prompt=LONG[:20], **CONTEXT_LEG))
    progress, _ = transceiver.notices
    assert progress[3] == 16


def test_a_prefill_that_nobody_follows_tells_only_its_end(parts):
    engine, link, transceiver, _ = parts
    run(engine, link, submit(prompt=LONG, **CONTEXT_LEG), submit("plain", request_type="context_only"))
    assert [notice[0] for notice in transceiver.notices] == ["k"]


def test_a_prefill_whose_first_token_is_its_last_is_handed_over_without_a_ticket(parts):
    engine, link, transceiver, _ = parts
    run(engine, link, submit(max_tokens=1, **CONTEXT_LEG))
    assert transceiver.notices == [("k", content_hash([1, 2, 3, 4, 5], ""), None, [5], "length")]


@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_a_prefill_that_is_aborted_is_withdrawn(parts, when):
    engine, link, transceiver, scheduler = parts
    if when == "in the middle":
        link.inbox.append(submit(prompt=LONG, **CONTEXT_LEG))
        for message in link.receive(0):
            engine._take(message)
        engine.step()
        run(engine, link, Abort("r"))
    else:
        run(engine, link, submit(prompt=LONG, **CONTEXT_LEG), Abort("r"))
    assert transceiver.notices == [("k", "the prefill was cancelled")]
    assert scheduler.pool.counts().active == 0


def test_an_invalid_prefill_is_withdrawn_with_its_error(parts):
    engine, link, transceiver, _ = parts
    run(engine, link, submit(prompt=range(100), **CONTEXT_LEG))
    ((key, reason),) = transceiver.notices
    assert key == "k" and "at most 63" in reason


def test_a_leg_that_follows_fetches_ahead_and_then_goes_on_as_usual(parts):
    engine, link, transceiver, scheduler = parts
    leg = submit(prompt=LONG, request_type="generation_only", owner="o", handover_key="k", max_tokens=2)
    run(engine, link, leg)
    assert transceiver.calls == [("follow", "o", "k")] and not link.events
    content = content_hash(list(LONG), "")
    transceiver.happened.append(PrefillProgress(1, content, 32, b"early"))
    run(engine, link)
    assert transceiver.fetches[0][:2] == (b"early", list(range(8)))
    assert 0 < engine.step() < 0.1, "deadlines must be looked after"
    note = msgspec.msgpack.encode(TokenEvent(request_id="theirs", token_ids=[9], num_cached_tokens=4))
    transceiver.happened += [
        FetchDone(1, 100, 0.1, 0.2, "shm", told=True),
        PrefillHanded(1, content, b"whole", note),
    ]
    run(engine, link)
    assert transceiver.fetches[1][:2] == (b"whole", [8, 9, 10])
    transceiver.happened.append(FetchDone(2, 100, 0.1, 0.2, "shm", told=True))
    run(engine, link)
    first, second = link.events
    assert first.handed_over and first.token_ids == [9] and first.num_cached_tokens == 4
    assert second.token_ids == [43] and second.finish_reason == "length"
    assert scheduler.pool.counts().active == 0


def test_a_failed_fetch_ahead_is_no_failure_of_the_leg(parts):
    engine, link, transceiver, scheduler = parts
    run(engine, link, submit(prompt=LONG, request_type="generation_only", owner="o", handover_key="k"))
    transceiver.happened.append(PrefillProgress(1, content_hash(list(LONG), ""), 32, b"early"))
    run(engine, link)
    transceiver.happened.append(FetchFailed(1, "stale", "reused"))
    run(engine, link)
    assert not link.events and scheduler.pool.counts().active == 0
    run(engine, link, Abort("r"))
    assert [event.finish_reason for event in link.events] == ["cancelled"]
    assert ("unfollow", 1) in transceiver.calls
