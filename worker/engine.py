"""The step loop: messages in, one plan, one model step, events out; beside it the transceiver moves blocks.

With overlap, a step is launched before the last one's tokens are read: the device never waits for the host.
It runs in one thread and owns the scheduler, so nothing here is locked. It does not know HTTP, text or the model.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from diptych.transceiver.settings import (
    FetchDone,
    FetchFailed,
    FollowEnded,
    LeaseEnded,
    PrefillHanded,
    PrefillProgress,
    QuarantineEnded,
)
from diptych.transceiver.transceiver import Transceiver
from diptych.wire import (
    Abort,
    EngineOutput,
    EngineStats,
    FromEngine,
    Ping,
    Pong,
    Release,
    SequenceTimes,
    Shutdown,
    Submit,
    ToEngine,
    TokenEvent,
    WatchBlocks,
)
from diptych.worker.announcing import Announcer
from diptych.worker.following import Following
from diptych.worker.iteration import iteration_stats
from diptych.worker.plan import Commit, Drawn, Offer, StepPlan
from diptych.worker.scheduler import Scheduler

log = logging.getLogger(__name__)

_STATS_INTERVAL_S = 0.1
_IDLE_WAIT_S = 1.0  # nothing to do: messages and finished copies wake the loop at once
_BLOCKED_WAIT_S = 0.02  # something waits for blocks, a lease or a deadline


class Link(Protocol):
    def receive(self, timeout_s: float) -> Iterable[ToEngine]: ...
    def send(self, message: FromEngine) -> None: ...


L = TypeVar("L")


class Runner(Protocol[L]):
    """`launch` starts a step; `collect` waits for it, after which peers may read what it computed, and says what
    each drawing chunk drew, or why nothing.
    """

    def launch(self, plan: StepPlan) -> L: ...
    def collect(self, launched: L) -> list[Drawn | str]: ...
    def needs_tokens(self, plan: StepPlan) -> bool:
        """Whether all earlier steps must be committed before this one is launched."""
        ...


@dataclass(frozen=True, slots=True)
class _Step(Generic[L]):
    plan: StepPlan
    launched: L


class Engine(Generic[L]):
    def __init__(
        self,
        link: Link,
        scheduler: Scheduler,
        runner: Runner[L],
        transceiver: Transceiver,
        *,
        overlap: bool = False,
        collect_iterations: bool = False,
        device_bytes: Callable[[], int] = int,
        follow_patience_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._scheduler = scheduler
        self._runner = runner
        self._transceiver = transceiver
        self._overlap = overlap
        self._collect_iterations = collect_iterations
        self._device_bytes = device_bytes  # in use, asked for once an iteration
        self._clock = clock
        self._announcer = Announcer(transceiver, scheduler.limits.tokens_per_block)
        self._following = Following(scheduler, transceiver, patience_s=follow_patience_s)
        self._fetches: dict[int, str] = {}  # fetch id -> request id
        self._under_way: _Step[L] | None = None
        self._tickets = 0  # open leases
        self._steps = 0
        self._checked = True
        self._stats_at = 0.0
        self._stats_sent: EngineStats | None = None

    def run(self) -> None:
        """Until a Shutdown message."""
        wait_s = 0.0
        while True:
            for message in self._link.receive(wait_s):
                if isinstance(message, Shutdown):
                    return
                self._take(message)
            wait_s = self.step()

    def close(self) -> None:
        self._transceiver.close()

    def step(self) -> float:
        """One turn of the loop; how long the next one may wait for something to happen, in seconds."""
        started = self._clock()
        self._poll_transceiver(started)
        followed = self._following.step(started)
        plan = self._scheduler.plan(started)
        for fetch in plan.fetches:
            ticket = fetch.sequence.request.ticket
            assert ticket is not None
            fetch_id = self._transceiver.fetch(ticket, fetch.source_indices, fetch.destination_blocks)
            self._fetches[fetch_id] = fetch.sequence.id
        was_busy = self._under_way is not None
        events = [*followed, *plan.events, *self._compute(plan)]
        self._send(events, plan, started)  # a first token to its client before all else
        for event in events:
            self._announcer.note(event)
        if plan.chunks or events or was_busy:
            self._checked = False
            return 0.0
        if self._scheduler.has_work or self._fetches or self._tickets or len(self._following):
            return _BLOCKED_WAIT_S
        self._check_once_idle()
        return _IDLE_WAIT_S

    def _check_once_idle(self) -> None:
        if self._checked:
            return
        self._checked = True
        try:
            self._scheduler.check(self._following.held_blocks)
        except AssertionError:
            log.exception("KV blocks are not conserved: please report this")

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit(owner="", handover_key=key):
                if key:
                    self._announcer.add(message)
                self._scheduler.add(message, self._clock())
            case Submit():
                self._following.add(message, self._clock())
            case Abort():
                self._following.abort(message.request_id)
                self._scheduler.abort(message.request_id)
                for fetch_id, request_id in self._fetches.items():
                    if request_id == message.request_id:
                        self._transceiver.abort(fetch_id)
            case Release():
                self._transceiver.release(message.ticket_id)
            case WatchBlocks(enabled=True):
                self._scheduler.pool.record_changes(with_tokens=message.with_tokens)
            case WatchBlocks():
                self._scheduler.pool.stop_recording()
            case Ping():
                self._link.send(Pong())

    def _poll_transceiver(self, now: float) -> None:
        for event in self._transceiver.poll(now):
            match event:
                case PrefillProgress() | PrefillHanded() | FollowEnded():
                    self._following.take(event, now)
                case FetchDone() | FetchFailed() if self._following.is_ours(event.fetch_id):
                    self._following.fetched(
                        event.fetch_id,
                        failure=getattr(event, "message", None),
                        held=getattr(event, "held", ()),
                    )
                case FetchDone():
                    request_id = self._fetches.pop(event.fetch_id)
                    times = SequenceTimes(
                        wire_s=event.wire_s,
                        wire_bytes=event.bytes,
                        fetched=event.told,
                        transport=event.transport,
                    )
                    self._scheduler.fetch_done(request_id, times, now)
                case FetchFailed():
                    request_id = self._fetches.pop(event.fetch_id)
                    if event.code != "cancelled":
                        log.warning(
                            "%s: KV fetch failed (%s), computing the prompt: %s",
                            request_id,
                            event.code,
                            event.message,
                        )
                    self._scheduler.fetch_failed(
                        request_id, SequenceTimes(transport="recompute"), now, held=event.held
                    )
                case QuarantineEnded():
                    self._scheduler.unlease(event.block_ids)
                case LeaseEnded():
                    self._tickets -= 1
                    self._scheduler.unlease(event.block_ids)

    def _compute(self, plan: StepPlan) -> Iterator[TokenEvent]:
        """Launches the plan; what the step before it brought, or the plan's own events without overlap."""
        before, self._under_way = self._under_way, None
        if before is not None and (not plan.chunks or self._runner.needs_tokens(plan)):
            yield from self._finish(before)
            before = None
        if plan.chunks:
            self._announcer.tell(plan.chunks)
            self._under_way = _Step(plan, self._runner.launch(plan))
        if before is not None:
            yield from self._finish(before)
        if self._under_way is not None and not self._overlap:
            step, self._under_way = self._under_way, None
            yield from self._finish(step)

    def _finish(self, step: _Step[L]) -> Iterator[TokenEvent]:
        commit: Commit = self._scheduler.commit(step.plan, self._runner.collect(step.launched), self._clock())
        self._steps += 1
        self._announcer.tell(step.plan.chunks)
        yield from commit.events
        for offer in commit.offers:
            yield self._offer(offer)

    def _offer(self, offer: Offer) -> TokenEvent:
        ticket_id, ticket = self._transceiver.offer(offer.blocks, offer.sequence.num_prompt)
        self._tickets += 1
        return msgspec.structs.replace(offer.event, ticket=ticket, ticket_id=ticket_id)

    def _send(self, events: list[TokenEvent], plan: StepPlan, started: float) -> None:
        now = self._clock()
        stats = None
        if now - self._stats_at >= _STATS_INTERVAL_S or not plan.chunks or self._collect_iterations:
            stats = self._stats(plan, started, now)
            if stats == self._stats_sent:
                stats = None
            else:
                self._stats_sent, self._stats_at = stats, now
        recorder = self._scheduler.pool.recorder
        blocks = None if recorder is None else recorder.drain()
        if events or stats is not None or blocks is not None:
            self._link.send(EngineOutput(events=events, stats=stats, blocks=blocks))

    def _stats(self, plan: StepPlan, started: float, now: float) -> EngineStats:
        scheduler = self._scheduler
        counts = scheduler.pool.counts()
        transfers = self._transceiver.metrics()
        prefills = scheduler.prefills()
        return EngineStats(
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            active_blocks=counts.active,
            leased_blocks=counts.leased,
            total_blocks=counts.total,
            tokens_per_block=scheduler.limits.tokens_per_block,
            waiting=scheduler.num_waiting,
            running=scheduler.num_running,
            prefilling=len(prefills),
            pending_prompt_tokens=sum(prefills),
            fetching=scheduler.num_fetching,
            steps=self._steps,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            generation_tokens=scheduler.num_generated_tokens,
            preemptions=scheduler.num_preemptions,
            fetches=transfers.fetches,
            fetch_failures=dict(transfers.failures),
            fetch_bytes=transfers.bytes,
            fetch_s=transfers.total_s,
            leases_expired=transfers.leases_ended.get("expired", 0),
            queued_fetches=transfers.queued_fetches,
            links=transfers.links,
            handovers=self._following.num_handed_over,
            blocks_ahead=self._following.num_blocks_ahead,
            iteration=iteration_stats(
                plan,
                scheduler,
                self._steps,
                planned_at=started,
                latency_s=now - started,
                device_bytes=self._device_bytes(),
            )
            if self._collect_iterations and plan.chunks
            else None,
        )
