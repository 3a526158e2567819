"""The step loop with a fake model, a fake transceiver and messages from a list: no processes, no clock."""

from collections import deque

import msgspec
import pytest

from diptych.block_hash import block_keys, unpack_keys
from diptych.transceiver.metrics import TransceiverMetrics
from diptych.transceiver.settings import (
    FetchDone,
    FetchFailed,
    LeaseEnded,
    PrefillHanded,
    PrefillProgress,
    QuarantineEnded,
)
from diptych.wire import (
    Abort,
    Release,
    SamplingParams,
    Shutdown,
    StoredBlock,
    Submit,
    TokenEvent,
    WatchBlocks,
)
from diptych.worker.blocks import BlockPool
from diptych.worker.engine import Engine
from diptych.worker.plan import Drawn, SchedulerLimits
from diptych.worker.scheduler import Scheduler
from diptych.worker.sequence import content_hash


class Link:
    def __init__(self):
        self.inbox = deque()
        self.sent = []

    def receive(self, timeout_s):
        while self.inbox:
            yield self.inbox.popleft()

    def send(self, message):
        self.sent.append(message)

    @property
    def events(self):
        return [event for message in self.sent for event in message.events]


class Model:
    """Draws the number of tokens before."""

    def __init__(self):
        self.log = []
        self.wants_tokens = False

    def needs_tokens(self, plan):
        return self.wants_tokens

    def launch(self, plan):
        self.log.append("launch")
        return [Drawn(chunk.start + chunk.count) for chunk in plan.chunks if chunk.draws]

    def collect(self, launched):
        self.log.append("collect")
        return launched


class Transceiver:
    def __init__(self):
        self.happened = []
        self.fetches = []
        self.offers = []
        self.calls = []
        self.followers = set()
        self.notices = []

    def poll(self, now):
        events, self.happened = self.happened, []
        return events

    def offer(self, block_ids, num_tokens):
        self.offers.append((list(block_ids), num_tokens))
        return f"t{len(self.offers)}", b"ticket"

    def fetch(self, ticket, source_indices, destination_blocks):
        self.fetches.append((ticket, list(source_indices), list(destination_blocks)))
        return len(self.fetches)

    def abort(self, fetch_id):
        self.calls.append(("abort", fetch_id))

    def release(self, ticket_id):
        self.calls.append(("release", ticket_id))

    def is_followed(self, key):
        return key in self.followers

    def show_progress(self, key, content, block_ids, num_tokens):
        self.notices.append((key, content, list(block_ids), num_tokens))

    def hand_over(self, key, content, ticket, note):
        event = msgspec.msgpack.decode(note, type=TokenEvent)
        self.notices.append((key, content, ticket, event.token_ids, event.finish_reason))

    def withdraw(self, key, reason):
        self.notices.append((key, reason))

    def follow(self, owner, key):
        self.calls.append(("follow", owner, key))
        return 1

    def unfollow(self, follow_id):
        self.calls.append(("unfollow", follow_id))

    def metrics(self):
        return TransceiverMetrics()

    def close(self):
        self.calls.append("close")


def build(**options):
    link, transceiver, model = Link(), Transceiver(), Model()
    limits = SchedulerLimits(max_batch_size=4, max_num_tokens=16, max_seq_len=64, tokens_per_block=4)
    scheduler = Scheduler(limits, BlockPool(16))
    engine = Engine(link, scheduler, model, transceiver, clock=lambda: 0.0, **options)
    return (engine, link, transceiver, scheduler), model


@pytest.fixture(params=[False, True], ids=["one by one", "overlapped"])
def parts(request):
    return build(overlap=request.param)[0]


def submit(request_id="r", prompt=(1, 2, 3, 4, 5), max_tokens=3, **fields):
    return Submit(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        **fields,
    )


def run(engine, link, *messages):
    link.inbox.extend([*messages])
    for message in link.receive(0):
        engine._take(message)
    for _ in range(10):
        if engine.step() > 0:
            return


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
