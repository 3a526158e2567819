"""Keeps the prefix index in step with the workers' caches: one long poll of GET /kv_events for each worker.

A worker that is not ready is forgotten at once, and asked for all of its blocks when it is back. One that tells
nothing is asked again now and then; until then only its load counts.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import msgspec

from diptych import block_hash
from diptych.errors import DiptychError
from diptych.router.exchange import Reply
from diptych.router.pool import Pool
from diptych.router.prefix_index import PrefixIndex
from diptych.router.worker_view import WorkerView
from diptych.wire import KvEvents

_log = logging.getLogger(__name__)
_WAIT_S = 10.0  # how long a worker holds a question that has no answer yet
_MARGIN_S = 5.0  # and how much later its answer may be here
_GATHER_S = 0.01  # between two questions: a burst of steps becomes one answer
_RETRY_S = (0.1, 5.0)
_NO_EVENTS_S = 60.0
_RECHECK_S = 3600.0


class FollowedWorker:
    """One worker's state of affairs, for the metrics."""

    __slots__ = ("is_current", "lag_s", "resyncs")

    def __init__(self) -> None:
        self.is_current = False
        self.lag_s = 0.0  # age of the oldest change in the last answer
        self.resyncs = 0  # times that all of its blocks were asked for


class PrefixFollower:
    """Use as ``async with``: following runs inside."""

    def __init__(self, pool: Pool, index: PrefixIndex, concerns: Callable[[WorkerView], bool]) -> None:
        """`concerns`: whether some policy looks at this worker's cache."""
        self._pool = pool
        self._index = index
        self._concerns = concerns
        self._tasks: dict[WorkerView, asyncio.Task[None]] = {}
        self._watch: asyncio.Task[None] | None = None
        self.followed: dict[str, FollowedWorker] = {}  # by worker id

    async def __aenter__(self) -> "PrefixFollower":
        self._watch = asyncio.create_task(self._follow_pool(), name="prefix-follower")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._tasks.values()] + ([self._watch] if self._watch is not None else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_pool(self) -> None:
        while True:
            self._adjust(self._wanted(self._pool))
            await self._pool.wait_until(lambda pool: self._wanted(pool) != self._tasks.keys(), _RECHECK_S)

    def _wanted(self, pool: Pool) -> set[WorkerView]:
        return {worker for worker in pool.workers if worker.ready and self._concerns(worker)}

    def _adjust(self, wanted: Iterable[WorkerView]) -> None:
        wanted = set(wanted)
        for worker in [*self._tasks]:
            if worker not in wanted:
                self._tasks.pop(worker).cancel()
                self._index.drop(worker.worker_id)
                del self.followed[worker.worker_id]
        for worker in wanted - self._tasks.keys():
            self.followed[worker.worker_id] = FollowedWorker()
            self._tasks[worker] = asyncio.create_task(
                self._follow(worker, self.followed[worker.worker_id]), name=f"prefixes-{worker.worker_id}"
            )

    async def _follow(self, worker: WorkerView, state: FollowedWorker) -> None:
        retry_s = _RETRY_S[0]
        while True:
            try:
                delay_s = await self._ask(worker, state)
                retry_s = _RETRY_S[0]
            except (DiptychError, msgspec.DecodeError, ValueError) as error:
                _log.info("worker %s: its block events do not come: %s", worker.worker_id, error)
                state.is_current = False
                if not isinstance(error, DiptychError):  # it answers, but not this question: begin anew
                    self._index.drop(worker.worker_id)
                delay_s, retry_s = retry_s, min(2 * retry_s, _RETRY_S[1])
            await asyncio.sleep(delay_s)

    async def _ask(self, worker: WorkerView, state: FollowedWorker) -> float:
        """One question and its answer; how long the next one may wait, in seconds."""
        facts = worker.facts
        if facts is None or facts.block_hash != block_hash.ALGORITHM:
            return self._give_up(worker, "it does not say how it names its blocks")
        asked = epoch, last = self._index.position(worker.worker_id)
        wait_ms = int(_WAIT_S * 1000)
        query = f"since={last}&wait_ms={wait_ms}" + ("" if epoch is None else f"&epoch={epoch}")
        reply: Reply = await worker.client.request(
            "GET", f"/kv_events?{query}", deadline=time.monotonic() + _WAIT_S + _MARGIN_S
        )
        if reply.status == 404:
            return self._give_up(worker, "it does not tell them")
        if reply.status != 200:
            raise ValueError(f"status {reply.status}")
        events = msgspec.msgpack.decode(reply.body, type=KvEvents)
        state.is_current = self._index.apply(worker.worker_id, asked, events)
        if events.changes is not None and events.changes.reset:
            state.resyncs += 1
            _log.debug("worker %s has %d blocks", worker.worker_id, self._index.size(worker.worker_id))
        state.lag_s = events.age_s
        return _GATHER_S

    def _give_up(self, worker: WorkerView, reason: str) -> float:
        _log.warning(
            "worker %s: its cached blocks are not known (%s); only its load counts", worker.worker_id, reason
        )
        self._index.drop(worker.worker_id)
        return _NO_EVENTS_S
