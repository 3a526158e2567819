"""From a block pool to a router's index: whatever happens on the way, the index is the cache in the end."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.block_hash import block_key, hash_block, pack_keys, unpack_keys
from diptych.router.prefix_index import PrefixIndex
from diptych.wire import BlockChanges, StoredBlock
from diptych.worker.block_log import BlockLog
from diptych.worker.blocks import BlockPool
from diptych.worker.kv_events import KvEventFeed, TrtBuffer

HASHES = [hash_block(b"", [number]) for number in range(12)]
KEYS = [block_key(block_hash) for block_hash in HASHES]


def changes(stored=(), removed=(), **fields) -> BlockChanges:
    return BlockChanges(stored=pack_keys(stored), removed=pack_keys(removed), **fields)


class Chain:
    """A pool, the log of its changes, and the index of a reader that asks when it likes."""

    def __init__(self, num_blocks: int, max_keys: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.log = BlockLog("epoch", max_keys=max_keys)
        self.index = PrefixIndex()

    def known(self) -> set[int]:
        return {key for key in KEYS if self.index.match("w", [key], 0.0)}

    def cached(self) -> set[int]:
        return {key for key, block_hash in zip(KEYS, HASHES, strict=True) if self.pool.match([block_hash])}

    def drain(self) -> None:
        drained = None if self.pool.recorder is None else self.pool.recorder.drain()
        if drained is not None:
            self.log.apply(drained, 0.0)

    def ask(self) -> None:
        asked = self.index.position("w")
        events = self.log.since(*asked, 0.0) or self.log.nothing_new()
        assert self.index.apply("w", asked, events)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 8),
    st.lists(
        st.one_of(st.integers(0, len(HASHES) - 1), st.sampled_from(["drain", "ask", "restart"])), max_size=60
    ),
)
def test_the_index_is_the_cache_after_an_answer(num_blocks, max_keys, events):
    chain = Chain(num_blocks, max_keys)
    chain.pool.record_changes(with_tokens=False)
    chain.drain()
    for event in events:
        if event == "drain":
            chain.drain()
        elif event == "ask":
            chain.drain()
            chain.ask()
            assert chain.known() == chain.cached()
        elif event == "restart":  # listening ends and begins again: everything is told anew
            chain.pool.stop_recording()
            chain.pool.record_changes(with_tokens=False)
        else:
            (block,) = chain.pool.allocate(1) or []
            chain.pool.publish(block, HASHES[event])
            chain.pool.release([block])
    chain.drain()
    chain.ask()
    assert chain.known() == chain.cached()
    assert chain.index.size("w") == len(chain.cached()) == len(chain.log)


def test_a_recorder_tells_each_block_once_and_in_its_last_state():
    pool = BlockPool(1)
    pool.record_changes(with_tokens=True)
    assert pool.recorder is not None
    first = pool.recorder.drain()
    assert first is not None and first.reset and not first.stored
    assert pool.recorder.drain() is None
    for number in (0, 1):
        (block,) = pool.allocate(1) or []
        assert pool.publish(block, HASHES[number])
        pool.recorder.describe(HASHES[number], b"", [number])
        pool.release([block])
    drained = pool.recorder.drain()
    assert drained is not None
    assert list(unpack_keys(drained.stored)) == [KEYS[1]]
    assert list(unpack_keys(drained.removed)) == [KEYS[0]]
    assert drained.described == [StoredBlock(KEYS[1], None, [1])]


def test_who_is_too_far_behind_or_of_another_epoch_gets_everything():
    log = BlockLog("new", max_keys=2)
    log.apply(changes([1], reset=True), 0.0)
    for key in (2, 3, 4):
        log.apply(changes([key]), 1.0)
    for asked in (("old", 4), (None, 0), ("new", 1), ("new", 9)):
        events = log.since(*asked, 3.0)
        assert events is not None and events.changes is not None and events.changes.reset, asked
        assert set(unpack_keys(events.changes.stored)) == {1, 2, 3, 4}
    events = log.since("new", 2, 3.0)
    assert events is not None and events.changes is not None and not events.changes.reset
    assert set(unpack_keys(events.changes.stored)) == {3, 4}
    assert events.age_s == 2.0
    assert log.since("new", 4, 3.0) is None


class Engine:
    def __init__(self) -> None:
        self.on_blocks = None
        self.watched: list[tuple[bool, bool]] = []

    def watch_blocks(self, *, enabled: bool, with_tokens: bool = False) -> None:
        self.watched.append((enabled, with_tokens))

    def tell(self, message: BlockChanges) -> None:
        assert self.on_blocks is not None
        self.on_blocks(message)


async def test_the_first_reader_makes_the_engine_tell():
    engine = Engine()
    feed = KvEventFeed(engine, "e")
    assert engine.watched == []
    reader = asyncio.create_task(feed.since(None, 0, 10.0))
    await asyncio.sleep(0)
    assert engine.watched == [(True, False)]
    engine.tell(changes([7], reset=True))
    events = await reader
    assert (events.epoch, events.last) == ("e", 1)
    waiting = asyncio.create_task(feed.since("e", 1, 10.0))
    await asyncio.sleep(0)
    engine.tell(changes([8]))
    events = await waiting
    assert events.changes is not None and list(unpack_keys(events.changes.stored)) == [8]
    assert (await feed.since("e", 2, 0.0)).changes is None


async def test_a_reader_that_waits_is_answered_when_the_worker_stops():
    feed = KvEventFeed(Engine(), "e")
    reader = asyncio.create_task(feed.since(None, 0, 60.0))
    await asyncio.sleep(0)
    feed.close()
    events = await asyncio.wait_for(reader, 1.0)
    assert events.changes is None


async def test_the_engine_is_quiet_again_when_nobody_has_asked_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diptych.worker.kv_events._FORGET_S", -1.0)
    engine = Engine()
    feed = KvEventFeed(engine, "e")
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(feed.since(None, 0, 0.0), 1.0)
    engine.tell(changes([1], reset=True))
    assert engine.watched[-1] == (False, False)
    engine.tell(changes([2]))  # was on its way
    reader = asyncio.create_task(feed.since("e", 1, 10.0))
    await asyncio.sleep(0)
    assert engine.watched[-1] == (True, False)
    assert not reader.done(), "until the engine has told everything, nothing is known"
    engine.tell(changes([3], reset=True))
    events = await reader
    assert events.changes is not None and events.changes.reset
    assert list(unpack_keys(events.changes.stored)) == [3]


async def test_tensorrt_llms_events():
    engine = Engine()
    feed = KvEventFeed(engine, "e", TrtBuffer(3, window_size=100, num_blocks=8))
    assert engine.watched == [(True, True)]
    engine.tell(
        changes([5, 6], [4], described=[StoredBlock(5, None, [1, 2]), StoredBlock(6, 5, [3, 4])], reset=True)
    )
    stored, child, removed = feed.drain_buffer()
    assert stored == {
        "event_id": 1,
        "window_size": 100,
        "data": {
            "type": "stored",
            "parent_hash": None,
            "blocks": [
                {
                    "block_hash": 5,
                    "tokens": [{"token_id": 1, "token_extra_id": 0}, {"token_id": 2, "token_extra_id": 0}],
                    "cache_level": 0,
                    "priority": 35,
                }
            ],
        },
    }
    assert child["data"]["parent_hash"] == 5
    assert removed["data"] == {"type": "removed", "block_hashes": [4]}
    assert feed.drain_buffer() == []
