"""Legs that wait for a prefill elsewhere: what they fetch ahead, what becomes of them, and whose blocks they hold."""

import itertools
import random
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulation, next_token, random_prompt, reference

from diptych.transceiver.settings import FollowEnded, PrefillHanded, PrefillProgress
from diptych.wire import SamplingParams, Submit, TokenEvent
from diptych.worker.following import Following
from diptych.worker.sequence import content_hash

PATIENCE_S = 100.0
PROMPT = list(range(1, 15))  # three blocks of four and two tokens


@dataclass
class FakeTransceiver:
    ids: itertools.count = field(default_factory=lambda: itertools.count(1))
    followed: dict[int, str] = field(default_factory=dict)
    fetches: dict[int, tuple[bytes, list[int], list[int]]] = field(default_factory=dict)

    def follow(self, owner, key):
        follow_id = next(self.ids)
        self.followed[follow_id] = f"{owner} {key}"
        return follow_id

    def unfollow(self, follow_id):
        self.followed.pop(follow_id, None)

    def fetch(self, ticket, source_indices, destination_blocks):
        fetch_id = next(self.ids)
        self.fetches[fetch_id] = (ticket, list(source_indices), list(destination_blocks))
        return fetch_id


class Worker:
    """A generation worker: the scheduler's simulation, and legs that follow."""

    def __init__(self, **options):
        self.sim = Simulation(**options)
        self.transceiver = FakeTransceiver()
        self.following = Following(self.sim.scheduler, self.transceiver, patience_s=PATIENCE_S)
        self.sim.held_elsewhere = lambda: self.following.held_blocks
        self.prompts = {}
        self.follow_ids = {}

    def follow(self, request_id="r", prompt=PROMPT, max_tokens=5, timeout_s=None):
        self.sim.events[request_id] = []
        self.prompts[request_id] = prompt
        before = set(self.transceiver.followed)
        self.following.add(
            Submit(
                request_id=request_id,
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
                request_type="generation_only",
                owner="host:1/a",
                handover_key=f"key/{request_id}",
                timeout_s=timeout_s,
            ),
            self.sim.now,
        )
        (self.follow_ids[request_id],) = set(self.transceiver.followed) - before

    def hear(self, kind, request_id="r", *rest):
        content = [] if kind is FollowEnded else [content_hash(self.prompts[request_id], "")]
        self.following.take(kind(self.follow_ids[request_id], *content, *rest), self.sim.now)

    def progress(self, num_tokens, request_id="r"):
        self.hear(PrefillProgress, request_id, num_tokens, b"early")

    def hand_over(self, request_id="r", **event):
        token = next_token(self.prompts[request_id])
        note = msgspec.msgpack.encode(TokenEvent(**{"request_id": "theirs", "token_ids": [token], **event}))
        del self.transceiver.followed[self.follow_ids[request_id]]  # nothing follows
        self.hear(PrefillHanded, request_id, b"ticket", note)

    def land(self, fetch_id, request_id="r"):
        """The copy ahead has ended well."""
        _, indices, blocks = self.transceiver.fetches.pop(fetch_id)
        self.sim.write(self.prompts[request_id], indices, blocks)
        self.following.fetched(fetch_id, failure=None)

    def step(self):
        self.sim._collect(self.following.step(self.sim.now))
        return self.sim.step()

    def run(self):
        while self.following or self.sim.scheduler.has_work or self.sim.fetches:
            self.step()
            while self.sim.fetches:
                self.sim.land(self.sim.fetches.pop())
        counts = self.sim.scheduler.pool.counts()
        assert counts.active == counts.leased == 0

    def event(self, request_id="r"):
        (event,) = self.sim.events[request_id]
        return event


def test_finished_chunks_are_fetched_while_the_prefill_goes_on_and_the_rest_at_its_end():
    worker = Worker()
    worker.follow()
    assert worker.transceiver.followed == {1: "host:1/a key/r"}
    worker.progress(4)
    worker.step()
    ((first, (ticket, indices, _)),) = worker.transceiver.fetches.items()
    assert (ticket, indices) == (b"early", [0])
    worker.progress(8)
    worker.progress(12)
    worker.step()
    assert len(worker.transceiver.fetches) == 1  # one at a time
    worker.land(first)
    worker.step()
    ((second, (_, indices, _)),) = worker.transceiver.fetches.items()
    assert indices == [1, 2]
    worker.land(second)
    assert worker.following.held_blocks == []
    worker.hand_over(num_cached_tokens=8)
    worker.step()
    (fetch,) = worker.sim.fetches
    assert list(fetch.source_indices) == [3]
    assert fetch.sequence.request.ticket == b"ticket"
    worker.run()
    first_event, *others = worker.sim.events["r"]
    assert first_event.handed_over and first_event.request_id == "r" and first_event.num_cached_tokens == 8
    assert not any(event.handed_over for event in others)
    assert worker.sim.tokens("r") == reference(PROMPT, 5)
    assert worker.following.num_blocks_ahead == 3


def test_a_short_prompt_is_only_handed_over():
    worker = Worker()
    worker.follow(prompt=[1, 2])
    worker.hand_over()
    worker.run()
    assert worker.sim.tokens("r") == reference([1, 2], 5)


def test_blocks_in_the_cache_are_not_fetched_ahead():
    worker = Worker()
    worker.sim.add("before", PROMPT)
    worker.run()
    worker.follow()
    worker.progress(12)
    worker.step()
    assert worker.transceiver.fetches == {}
    worker.follow("longer", [*PROMPT[:8], *range(30, 40)])
    worker.progress(16, "longer")
    worker.step()
    ((_, indices, _),) = worker.transceiver.fetches.values()
    assert indices == [2, 3]


def test_the_handover_waits_for_the_copy_that_runs():
    worker = Worker()
    worker.follow()
    worker.progress(8)
    worker.step()
    worker.hand_over()
    worker.step()
    assert worker.sim.events["r"] == [] and worker.sim.fetches == []
    (fetch_id,) = worker.transceiver.fetches
    worker.land(fetch_id)
    worker.step()
    assert list(worker.sim.fetches[0].source_indices) == [2, 3]
    worker.run()
    assert worker.sim.tokens("r") == reference(PROMPT, 5)


def test_a_failed_copy_ahead_is_made_good_at_the_end():
    worker = Worker()
    worker.follow()
    worker.progress(8)
    worker.step()
    (fetch_id,) = worker.transceiver.fetches
    worker.following.fetched(fetch_id, failure="stale")
    worker.transceiver.fetches.clear()
    worker.progress(12)
    worker.step()
    assert worker.transceiver.fetches == {} and worker.following.held_blocks == []
    worker.hand_over()
    worker.step()
    assert list(worker.sim.fetches[0].source_indices) == [0, 1, 2, 3]
    worker.run()
    assert worker.sim.tokens("r") == reference(PROMPT, 5)


def test_blocks_in_which_a_copy_ahead_lingers_are_nobodys():
    worker = Worker()
    worker.follow()
    worker.progress(8)
    worker.step()
    ((fetch_id, (_, _, blocks)),) = worker.transceiver.fetches.items()
    worker.following.fetched(fetch_id, failure="too late", held=tuple(blocks))
    counts = worker.sim.scheduler.pool.counts()
    assert counts.leased == len(blocks) == 2 and counts.active == 0
    worker.sim.scheduler.unlease(blocks)
    worker.hand_over()
    worker.run()
    assert worker.sim.tokens("r") == reference(PROMPT, 5)


def test_nothing_is_fetched_ahead_into_blocks_that_others_need():
    worker = Worker(num_blocks=8)
    worker.sim.add("big", [9] * 20, max_tokens=8)  # may need 7 blocks
    worker.step()
    worker.follow()
    worker.progress(12)
    worker.step()
    assert worker.transceiver.fetches == {}
    worker.hand_over()
    worker.run()
    assert worker.sim.tokens("r") == reference(PROMPT, 5)
    assert worker.sim.tokens("big") == reference([9] * 20, 8)


def test_nothing_is_fetched_ahead_while_others_wait():
    worker = Worker(max_batch_size=1)
    worker.sim.add("runs", [1, 2], max_tokens=30)
    worker.sim.add("waits", [3, 4])
    worker.step()
    worker.follow()
    worker.progress(12)
    worker.step()
    assert worker.transceiver.fetches == {}


def test_without_a_prefix_cache_nothing_is_fetched_ahead():
    worker = Worker()
    worker.sim.scheduler.pool._reuse = False
    worker.follow()
    worker.progress(12)
    worker.step()
    assert worker.transceiver.fetches == {}
    worker.hand_over()
    worker.run()
    assert worker.sim.tokens("r") == reference(PROMPT, 5)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_first_token_that_was_the_last_ends_the_leg(reason):
    worker = Worker()
    worker.follow()
    worker.hand_over(finish_reason=reason)
    worker.step()
    assert worker.event().handed_over and worker.event().finish_reason == reason
    assert not worker.sim.scheduler.has_work and len(worker.following) == 0


def test_an_abort_is_final_and_the_copy_that_runs_keeps_its_blocks():
    worker = Worker()
    worker.follow()
    worker.progress(12)
    worker.step()
    worker.following.abort("r")
    worker.following.abort("r")
    worker.following.abort("never heard of")
    worker.step()
    assert worker.event().finish_reason == "cancelled" and worker.transceiver.followed == {}
    assert len(worker.following.held_blocks) == 3
    (fetch_id,) = worker.transceiver.fetches
    worker.land(fetch_id)
    assert worker.following.held_blocks == [] and len(worker.following) == 0
    worker.hear(PrefillProgress, "r", 12, b"late")  # it was on its way
    assert len(worker.sim.events["r"]) == 1
    worker.sim.add("same", PROMPT)  # what came is of use to others
    worker.step()
    assert worker.sim.scheduler.num_cached_tokens == 12


def test_a_lost_prefill_ends_the_leg_with_a_status_that_the_router_retries():
    worker = Worker()
    worker.follow()
    worker.hear(FollowEnded, "r", "the owner is gone")
    worker.step()
    assert (worker.event().error, worker.event().error_status) == ("the owner is gone", 503)


@pytest.mark.parametrize("kind", ["progress", "hand_over"])
def test_kv_of_another_prompt_is_not_taken(kind):
    worker = Worker()
    worker.follow()
    worker.prompts["r"] = [7, *PROMPT[1:]]  # what the context worker made of the same text
    worker.progress(12) if kind == "progress" else worker.hand_over()
    worker.step()
    assert worker.event().error_status == 503 and "other tokens" in worker.event().error
    assert worker.transceiver.fetches == {} and not worker.sim.scheduler.has_work


def test_a_note_that_cannot_be_read_ends_the_leg():
    worker = Worker()
    worker.follow()
    worker.hear(PrefillHanded, "r", b"ticket", b"\xc1")
    worker.step()
    assert worker.event().error_status == 503


def test_silence_ends_the_leg_and_news_prolongs_it():
    worker = Worker()
    worker.follow()
    worker.sim.now = PATIENCE_S - 1
    worker.progress(2)
    worker.sim.now += PATIENCE_S - 1
    worker.step()
    assert worker.sim.events["r"] == []
    worker.sim.now += 1
    worker.step()
    assert "nothing was heard" in worker.event().error and worker.event().error_status == 503


def test_the_requests_deadline_ends_the_leg():
    worker = Worker()
    worker.follow(timeout_s=10)
    worker.sim.now = 10
    worker.step()
    assert (worker.event().finish_reason, worker.event().error_status) == ("timeout", 504)


def test_the_deadline_counts_from_the_dispatch_also_after_the_handover():
    worker = Worker()
    worker.follow(timeout_s=10, max_tokens=20)
    worker.sim.now = 7
    worker.hand_over()
    worker.run()
    assert worker.sim.events["r"][-1].finish_reason == "timeout"


@given(seed=st.integers(0, 2**32), policy=st.sampled_from(["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_every_leg_ends_once_with_the_right_tokens_and_no_block_is_lost(seed, policy):
    rng = random.Random(seed)
    worker = Worker(num_blocks=rng.randrange(10, 30), policy=policy)
    open_legs, computed, ahead = {}, {}, {}
    for number in range(12):
        name = f"leg {number}"
        prompt = random_prompt(rng, 1, 24)
        if rng.random() < 0.3:
            worker.sim.add(name, prompt)
        else:
            worker.follow(name, prompt)
            open_legs[name] = None
            computed[name] = 0
        for _ in range(rng.randrange(4)):
            disturb(worker, rng, open_legs, computed, ahead)
            worker.step()
            ahead |= {
                fetch_id: worker.following._prefetching[fetch_id] for fetch_id in worker.transceiver.fetches
            }
    for name in list(open_legs):
        worker.hand_over(name)
    while worker.transceiver.fetches:
        end_copy(worker, rng, ahead)
    worker.run()
    assert len(worker.following) == 0 and worker.transceiver.followed == {}
    for name, events in worker.sim.events.items():
        assert sum(event.finish_reason is not None for event in events) == 1
        if events[-1].finish_reason in ("stop", "length"):
            prompt = worker.prompts.get(name) or []
            assert not prompt or worker.sim.tokens(name) == reference(prompt, 5)


def disturb(worker, rng, open_legs, computed, ahead):
    if worker.transceiver.fetches and rng.random() < 0.5:
        end_copy(worker, rng, ahead)
    while worker.sim.fetches:
        fetch = worker.sim.fetches.pop()
        worker.sim.land(fetch) if rng.random() < 0.8 else worker.sim.fail(fetch)
    if not open_legs:
        return
    name = rng.choice(list(open_legs))
    match rng.randrange(8):
        case 0:
            worker.following.abort(name)
            del open_legs[name]
        case 1:
            worker.hear(FollowEnded, name, "gone")
            del open_legs[name]
        case 2 | 3:
            worker.hand_over(name)
            del open_legs[name]
        case _:
            left = len(worker.prompts[name]) - 1 - computed[name]
            computed[name] += rng.randrange(max(1, left + 1))
            worker.progress(computed[name], name)


def end_copy(worker, rng, ahead):
    fetch_id = rng.choice(list(worker.transceiver.fetches))
    if rng.random() < 0.3:
        del worker.transceiver.fetches[fetch_id]
        worker.following.fetched(fetch_id, failure="corrupt")
    else:
        worker.land(fetch_id, ahead[fetch_id].followed.sequence.id)
