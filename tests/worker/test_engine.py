"""The step loop with everything around it faked."""

import pytest
from engine_fakes import Model, build, run, submit

from diptych.block_hash import block_keys, unpack_keys
from diptych.transceiver.settings import FetchDone, FetchFailed, LeaseEnded, QuarantineEnded
from diptych.wire import Abort, Release, Shutdown, StoredBlock, WatchBlocks
from diptych.worker.engine import Engine


def test_a_request_from_submit_to_its_end(parts):
    engine, link, _, scheduler = parts
    run(engine, link, submit())
    assert [event.token_ids for event in link.events] == [[5], [6], [7]]
    assert [event.finish_reason for event in link.events] == [None, None, "length"]
    assert link.events[0].times is not None and link.events[1].times is None
    scheduler.check()


def test_a_context_leg_gets_a_ticket_and_the_lease_ends_once(parts):
    engine, link, transceiver, scheduler = parts
    run(engine, link, submit(request_type="context_only"))
    (event,) = link.events
    assert event.ticket == b"ticket" and event.ticket_id == "t1" and event.finish_reason is None
    ((blocks, num_tokens),) = transceiver.offers
    assert num_tokens == 5 and scheduler.pool.counts().leased == len(blocks) == 2
    run(engine, link, Release("t1"))
    assert transceiver.calls == [("release", "t1")]
    transceiver.happened.append(LeaseEnded("t1", tuple(blocks), "cancelled"))
    run(engine, link)
    assert scheduler.pool.counts().leased == 0
    scheduler.check()


@pytest.mark.parametrize(
    ("outcome", "transport", "fetched"),
    [
        (FetchDone(1, 100, 0.1, 0.2, "shm", told=True), "shm", True),
        (FetchDone(1, 0, 0.0, 0.1, "", told=True), "", True),
        (FetchDone(1, 0, 0.0, 0.1, "", told=False), "", False),
        (FetchFailed(1, "stale", "reused"), "recompute", False),
    ],
    ids=["copied", "nothing to copy", "nothing to copy, owner out of reach", "failed"],
)
def test_a_generation_leg_goes_on_after_its_fetch_whatever_came_of_it(parts, outcome, transport, fetched):
    engine, link, transceiver, _ = parts
    leg = submit(request_type="generation_only", output_token_ids=[9], ticket=b"ticket")
    run(engine, link, leg)
    assert transceiver.fetches[0][:2] == (b"ticket", [0, 1]) and not link.events
    transceiver.happened.append(outcome)
    run(engine, link)
    assert [event.token_ids for event in link.events] == [[6], [7]]
    times = link.events[0].times
    assert (times.transport, times.fetched) == (transport, fetched)


def test_an_abort_reaches_the_copy_and_blocks_wait_for_it(parts):
    engine, link, transceiver, scheduler = parts
    run(engine, link, submit(request_type="generation_only", output_token_ids=[9], ticket=b"ticket"))
    run(engine, link, Abort("r"))
    assert transceiver.calls == [("abort", 1)]
    assert scheduler.pool.counts().active == 2, "a copy may still write"
    transceiver.happened.append(FetchFailed(1, "cancelled", "aborted"))
    run(engine, link)
    assert scheduler.pool.counts().active == 0
    assert [event.finish_reason for event in link.events] == ["cancelled"]


def test_a_leg_goes_on_though_its_copy_lingers(parts):
    engine, link, transceiver, scheduler = parts
    run(engine, link, submit(request_type="generation_only", output_token_ids=[9], ticket=b"ticket"))
    held = tuple(transceiver.fetches[0][2])
    transceiver.happened.append(FetchFailed(1, "deadline", "too late", held))
    run(engine, link)
    assert [event.token_ids for event in link.events] == [[6], [7]]
    assert scheduler.pool.counts().leased == len(held) == 2
    transceiver.happened.append(QuarantineEnded(held))
    run(engine, link)
    assert scheduler.pool.counts().leased == 0


def test_the_loop_says_how_long_it_may_sleep(parts):
    engine, link, _, _ = parts
    assert engine.step() >= 1.0, "nothing to do"
    link.inbox.append(submit(request_type="generation_only", output_token_ids=[9], ticket=b"t"))
    for message in link.receive(0):
        engine._take(message)
    engine.step()
    assert 0 < engine.step() < 0.1, "a copy is under way: deadlines must be looked after"


def test_a_step_is_launched_before_the_last_one_is_read():
    (engine, link, _, scheduler), model = build(overlap=True)
    run(engine, link, submit(max_tokens=4))
    assert model.log == ["launch", *["launch", "collect"] * 3, "collect"]
    assert [event.token_ids for event in link.events] == [[5], [6], [7], [8]]
    scheduler.check()


def test_a_plan_that_needs_all_tokens_waits_for_them():
    (engine, link, _, _), model = build(overlap=True)
    model.wants_tokens = True
    run(engine, link, submit(max_tokens=3))
    assert model.log == ["launch", "collect"] * 3


def test_shutdown_ends_the_loop(parts):
    engine, link, _, _ = parts
    link.inbox.append(Shutdown())
    engine.run()
    engine.close()


def test_statistics_say_where_the_blocks_are(parts):
    engine, link, _, _ = parts
    run(engine, link, submit())
    stats = [message.stats for message in link.sent if message.stats][-1]
    total = stats.free_blocks + stats.cached_blocks + stats.active_blocks + stats.leased_blocks
    assert total == stats.total_blocks == 16 and stats.generation_tokens == 3


def test_who_listens_hears_what_enters_the_cache_and_first_what_is_in_it(parts):
    engine, link, _, _ = parts
    run(engine, link, submit("before"))
    assert all(message.blocks is None for message in link.sent), "nobody listens"
    link.sent.clear()
    run(engine, link, WatchBlocks(enabled=True, with_tokens=True))
    (told,) = [message.blocks for message in link.sent if message.blocks is not None]
    assert told.reset and list(unpack_keys(told.stored)) == block_keys([1, 2, 3, 4], 4)
    link.sent.clear()
    run(engine, link, submit("after", prompt=(1, 2, 3, 4, 9, 9, 9, 9, 9)))
    (told,) = [message.blocks for message in link.sent if message.blocks is not None]
    first, second = block_keys([1, 2, 3, 4, 9, 9, 9, 9], 4)
    assert not told.reset and list(unpack_keys(told.stored)) == [second]
    assert told.described == [StoredBlock(second, first, [9, 9, 9, 9])]
    link.sent.clear()
    run(engine, link, WatchBlocks(enabled=False), submit("unheard", prompt=(7, 7, 7, 7, 7)))
    assert all(message.blocks is None for message in link.sent)


def test_iteration_statistics_have_what_tensorrt_llm_prints(parts):
    _, link, transceiver, scheduler = parts
    now = [0.0]
    engine = Engine(link, scheduler, Model(), transceiver, collect_iterations=True, clock=lambda: now[0])
    link.inbox.append(submit("a"))
    list(map(engine._take, link.receive(0)))
    for now[0] in (0.25, 0.5):
        engine.step()
    first, second = [message.stats.iteration for message in link.sent if message.stats.iteration]
    assert (first["numNewActiveRequests"], first["newActiveRequestsQueueLatencyMS"]) == (1, 250.0)
    assert (second["numNewActiveRequests"], second["newActiveRequestsQueueLatencyMS"]) == (0, 0)
    assert first["timestamp"]
