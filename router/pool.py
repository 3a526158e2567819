"""The live workers: who may be given a leg now.

Follows a registry's snapshots, asks each worker regularly how it is, and believes a failed connection at
once. A worker is ready when the registry does not say otherwise and its last probe found it READY.
Knows nothing of requests beyond how many are in flight.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import get_args

import msgspec

from diptych.discovery import Registry, Snapshot
from diptych.errors import DeadlineExceeded, DiptychError, WorkerLost
from diptych.router.client import NO_HEADERS
from diptych.router.deadline import within
from diptych.router.probe import WorkerFacts, ask
from diptych.router.settings import Limits, MinimalSettings
from diptych.router.worker_view import LegRole, WorkerView
from diptych.wire import WorkerInfo

_log = logging.getLogger(__name__)


class Pool:
    """Use as ``async with``: watching and probing run inside."""

    def __init__(
        self,
        registry: Registry,
        limits: Limits,
        *,
        rng: random.Random | None = None,
        minimal: MinimalSettings | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        """`minimal`: how many workers of each role make the mesh ready [1]. `headers`: of all that we ask workers."""
        self._headers = headers
        self.minimal: Mapping[LegRole, int] = {
            "CONTEXT": 1 if minimal is None else minimal.context_servers,
            "GENERATION": 1 if minimal is None else minimal.generation_servers,
        }
        self._registry = registry
        self._limits = limits
        self._rng = rng or random.Random()
        self._workers: dict[str, WorkerView] = {}
        self._announced: Mapping[str, WorkerInfo] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._ready: dict[tuple[LegRole, str | None], tuple[WorkerView, ...]] = {}
        self._reported_models: frozenset[str] = frozenset()

    async def __aenter__(self) -> "Pool":
        self._watch = asyncio.create_task(self._follow(), name="registry-watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._probes] + ([self._watch] if self._watch is not None else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self._workers.values():
            worker.client.close()

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        return tuple(self._workers.values())

    def ready(self, role: LegRole, model: str | None = None) -> tuple[WorkerView, ...]:
        """Workers that may be given this leg of a request for this model."""
        key = (role, model)
        found = self._ready.get(key)
        if found is None:
            found = tuple(w for w in self.workers if w.ready and w.has_role(role) and w.serves(model))
            if found:  # names that nobody serves are not kept: clients choose them
                self._ready[key] = found
        return found

    def unhindered(self, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
        """Those that may take a leg now: not the ones on probation that are full, unless all of them are."""
        for worker in workers:
            if worker.allowance is not None:
                return [worker for worker in workers if not worker.is_full] or workers
        return workers

    def models(self) -> tuple[str, ...]:
        """Every name that some worker answers to."""
        return tuple(dict.fromkeys(name for worker in self.workers for name in worker.models))

    def report_lost(self, worker: WorkerView, error: DiptychError) -> None:
        """A leg found that the worker cannot be reached: down until a probe says otherwise."""
        if worker.facts is not None:
            _log.warning("worker %s is down: %s", worker.worker_id, error.message)
            worker.facts = None
            worker.allowance = 1
            worker.kick.set()
            self._drop_unannounced()
            self._note_change()

    async def wait_until(self, condition: Callable[["Pool"], bool], timeout_s: float) -> bool:
        """True as soon as the condition holds, False when it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition(self):
            try:
                await within(deadline - time.monotonic(), self._changed.wait())
            except asyncio.TimeoutError:
                return condition(self)
        return True

    def _note_change(self) -> None:
        self._ready.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _follow(self) -> None:
        delay_s = 1.0
        while True:
            try:
                async for snapshot in self._registry.watch():
                    self._apply(snapshot)
                    delay_s = 1.0
                return  # the registry was closed; the last snapshot stays
            except Exception:
                _log.exception(
                    "the registry failed; serving on its last snapshot, next try in %.0f s", delay_s
                )
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, 30.0)

    def _apply(self, snapshot: Snapshot) -> None:
        earlier, self._announced = self._announced, {info.worker_id: info for info in snapshot}
        before = {worker.info.url: worker for worker in self._workers.values()}
        changed = False
        for worker_id, info in self._announced.items():
            worker = self._workers.get(worker_id)
            if worker is not None and info.url != worker.info.url:
                self._drop(worker_id)
                worker = None
            if worker is None:
                self._add(info, before.get(info.url))
                changed = True
            elif info != worker.info:
                changed = self._update(worker, info) or changed
        if self._drop_unannounced() or changed:
            self._note_change()
        for worker_id in self._workers.keys() & (earlier.keys() - self._announced.keys()):
            worker = self._workers[worker_id]
            _log.warning("worker %s is not announced any more, and kept: its role has no other", worker_id)
            worker.news = True
            worker.kick.set()

    def _drop_unannounced(self) -> bool:
        """Except who answers and has a role that no other ready worker has: a registry that lost the workers
        (its leases ended, or they cannot reach it) must not end the service."""
        ready = [worker for worker in self._workers.values() if worker.ready]
        covered = {
            role
            for worker in ready
            for role in get_args(LegRole)
            if worker.worker_id in self._announced and worker.has_role(role)
        }
        dropped = False
        for worker_id in self._workers.keys() - self._announced.keys():
            worker = self._workers[worker_id]
            roles = {role for role in get_args(LegRole) if worker.has_role(role)}
            if worker in ready and roles - covered:
                continue
            self._drop(worker_id)
            dropped = True
        return dropped

    def _update(self, worker: WorkerView, info: WorkerInfo) -> bool:
        """False when only its load is another: workers tell that every second."""
        old, worker.info = worker.info, info
        if msgspec.structs.replace(old, load=info.load) == info:
            return False
        if info.incarnation != old.incarnation:
            worker.facts = None
        if info.state != old.state:
            _log.info("worker %s is announced as %s", worker.worker_id, info.state)
        worker.news = True
        worker.kick.set()
        return True

    def _add(self, info: WorkerInfo, before: WorkerView | None) -> None:
        """`before`: who had the same address until now."""
        try:
            worker = WorkerView(info, self._limits, self._headers)
        except DiptychError as error:
            _log.error("worker %s is left out: %s", info.worker_id, error.message)
            return
        _log.info("Server %s is added", info.url)
        facts = None if before is None else before.facts
        if before is not None and facts is not None and facts.incarnation == info.incarnation != "":
            worker.learn(facts)  # the same process under another name: it stays in service
            worker.incarnation, worker.probed = before.incarnation, before.probed
        self._workers[info.worker_id] = worker
        probe = asyncio.create_task(self._keep_probing(worker), name=f"probe-{info.worker_id}")
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    def _drop(self, worker_id: str) -> None:
        worker = self._workers.pop(worker_id)
        worker.is_dropped = True
        worker.kick.set()
        worker.client.close()  # legs that run on it go on
        _log.info("Server %s is removed", worker.info.url)

    async def _keep_probing(self, worker: WorkerView) -> None:
        """Also of a dropped worker while legs run on it: it may hang."""
        retry_s = self._limits.probe_retry_s
        while worker.in_flight or not worker.is_dropped:
            worker.kick.clear()  # before the probe: news that come during it ask for another one
            worker.news = False
            await self._probe(worker)
            if worker.facts is not None:
                retry_s = self._limits.probe_retry_s
                delay_s = 0.0 if worker.misses else self._limits.probe_interval_s
            else:
                delay_s = retry_s
                retry_s = min(retry_s * 1.6, self._limits.probe_retry_max_s)
            await self._pause(worker, delay_s * self._rng.uniform(0.8, 1.2))

    async def _pause(self, worker: WorkerView, delay_s: float) -> None:
        """Sleep, unless news of the worker come; a loss just found is given its first delay all the same."""
        is_over = False

        def over() -> None:
            nonlocal is_over
            is_over = True
            worker.kick.set()

        timer = asyncio.get_running_loop().call_later(delay_s, over)  # costs less than a task that waits
        try:
            await worker.kick.wait()
        finally:
            timer.cancel()
        if not is_over and worker.facts is None and not worker.news:
            await asyncio.sleep(self._limits.probe_retry_s * self._rng.uniform(0.8, 1.2))

    async def _probe(self, worker: WorkerView) -> None:
        asked = time.monotonic()
        deadline = asked + self._limits.probe_s
        before = worker.state
        try:
            answer = await ask(worker.client, deadline)
            worker.misses = 0
            self._fence(worker, answer)
            worker.note_load(answer.num_requests)
            facts: WorkerFacts | None = answer
            reason = ""
        except DeadlineExceeded as error:
            # One late answer of a busy worker is not a death, and none that streams is dead.
            worker.misses = 0 if worker.client.last_heard > asked else worker.misses + 1
            facts = worker.facts if worker.misses < 2 else None
            reason = error.message
        except DiptychError as error:
            facts, reason = None, error.message
        if facts is None and worker.facts is not None:
            worker.allowance = 1
            worker.client.cut(WorkerLost(f"The worker at {worker.client.url} does not answer: {reason}"))
        if facts == worker.facts and worker.probed:
            return
        worker.learn(facts)
        worker.probed = True
        self._drop_unannounced()
        self._note_change()
        if worker.state != before:
            level = logging.WARNING if facts is None else logging.INFO
            _log.log(
                level, "worker %s is %s%s", worker.worker_id, worker.state, f": {reason}" if reason else ""
            )
        self._compare_models()

    def _fence(self, worker: WorkerView, facts: WorkerFacts) -> None:
        """Another process answers at this address: what still runs there belongs to one that is gone."""
        if worker.incarnation and facts.incarnation != worker.incarnation:
            worker.client.cut(WorkerLost(f"The worker at {worker.client.url} was started anew."))
            worker.allowance = 1
        worker.incarnation = facts.incarnation

    def _compare_models(self) -> None:
        """A mesh is meant to serve one model; say so once for each set of models seen."""
        mains = _main_models(self._workers.values())
        if len(mains) > 1 and frozenset(mains) != self._reported_models:
            self._reported_models = frozenset(mains)
            named = "; ".join(f"{model!r} on {', '.join(ids)}" for model, ids in mains.items())
            _log.error("the workers serve different models: %s; each request stays with one of them", named)


def _main_models(workers: Iterable[WorkerView]) -> dict[str, list[str]]:
    mains: dict[str, list[str]] = {}
    for worker in workers:
        if worker.models:
            mains.setdefault(worker.models[0], []).append(worker.worker_id)
    return mains
