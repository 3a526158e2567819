"""The leg that the client's answer comes from, on as many workers as it takes.

    fails before its first byte   another generation worker, then a context worker, with the same ticket
    stream breaks off             the next worker goes on from the tokens that the client has, by the journal;
                                  without a journal: one error event and [DONE]
    nobody is left                a stream that has begun waits a while for somebody to come back

Text, draws and usage go on as if nothing had happened: the worker feeds the tokens so far through the same
state, and draws depend on seed and position only. The number of resumes is bounded: a request that kills
workers must not kill all of them.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus

from diptych.errors import DiptychError, WorkerLost
from diptych.journal import END, JournalError, read_journal
from diptych.router.downstream import Answered, Downstream
from diptych.router.early_leg import EarlyLeg
from diptych.router.exchange import Exchange, Reply
from diptych.router.fields import needle
from diptych.router.frontends.openai import Call, Prefill
from diptych.router.leg import Leg, is_late, left
from diptych.router.pool import Pool
from diptych.router.worker_view import WorkerView
from diptych.wire import FETCHED_HEADER

_log = logging.getLogger(__name__)

_FETCHED = needle(FETCHED_HEADER)
_OK = HTTPStatus.OK  # see flow.py
_ELSEWHERE = {429, 500, 502, 503}  # statuses that another worker may do better

# Workers to try, none of the given ones; each that is given out is added to them.
ChooseWorkers = Callable[[set[str]], Iterator[WorkerView]]


class FinalLeg:
    def __init__(
        self,
        leg: Leg,
        pool: Pool,
        call: Call,
        client: Downstream,
        choose: ChooseWorkers,
        *,
        resumes: int,
        wait_s: float,
        prefill: Prefill | None,
        release: Callable[[Iterable[int] | None], None] | None,
        early: EarlyLeg | None = None,
    ) -> None:
        """`prefill`: None when this leg does the whole request. `release` returns its choices' tickets.

        `early`: a generation leg that is under way, to be taken first.
        """
        self._leg = leg
        self._pool = pool
        self._call = call
        self._client = client
        self._choose = choose
        self._resumes = resumes
        self._wait_s = wait_s
        self._prefill = prefill
        self._release = release
        self._body = call.whole_body() if prefill is None else call.generation_body(prefill)
        self._early = early if early is not None and early.worker is not None else None
        self._journal = bytearray() if self._early is None else self._early.journal
        self._is_beyond_repair = False  # the client has bytes that no journal knows
        self._knows_fetched = False  # the worker has said whether it fetched
        self._failures = 0
        self._tried: set[str] = set()
        self._workers = choose(self._tried)

    @property
    def tickets_are_settled(self) -> bool:
        """The first worker did it all, and fetched the blocks of every ticket, or they have been returned."""
        return self._failures == 0 and not self._client.failed and self._knows_fetched

    async def run(self, failure: DiptychError | Reply | None) -> Answered:
        """`failure`: what the client is told when there is no worker at all."""
        call, client, leg = self._call, self._client, self._leg
        while (worker := await self._next_worker(failure)) is not None:
            leg.count_attempt(self._failures)
            try:
                outcome = await self._try(worker)
            except DiptychError as error:
                leg.note_failure(call, worker, error)
                self._failures += 1
                failure = error
                if self._journal.endswith(END):
                    return await client.finish(left(call))
                if not self._can_go_on(error):
                    break
                continue
            if not isinstance(outcome, Reply):
                return outcome
            self._failures += 1
            failure = outcome
        if isinstance(failure, Reply):
            return await client.refuse(failure, left(call))
        return await client.fail(failure or leg.nobody(self._wait_s), left(call))

    async def _next_worker(self, failure: DiptychError | Reply | None) -> WorkerView | None:
        if self._early is not None:
            return self._early.worker
        worker = next(self._workers, None)
        if worker is not None or not isinstance(failure, WorkerLost) or not self._client.started:
            return worker
        if self._resumes == 0:
            return None
        self._resumes -= 1
        _log.warning("request %s: no worker is left, waiting for one", self._call.request_id)

        def somebody_is_ready(pool: Pool) -> bool:
            nonlocal worker
            self._tried.clear()  # who was lost may be back
            self._workers = self._choose(self._tried)
            worker = next(self._workers, None)
            return worker is not None

        wait_s = min(self._wait_s, self._call.deadline - time.monotonic())
        await self._pool.wait_until(somebody_is_ready, wait_s)
        return worker

    async def _try(self, worker: WorkerView) -> Answered | Reply:
        """The answer, or a reply that another worker may do better; raises when the worker fails."""
        call, client, metrics = self._call, self._client, self._leg.metrics
        early, self._early = self._early, None
        started = time.monotonic()
        with worker:
            async with self._send(worker) if early is None else early.take() as exchange:
                self._note_fetched(exchange)
                if exchange.status == _OK and call.stream:
                    first = await exchange.first()
                    metrics.first_token.observe(time.monotonic() - started)
                    await self._relay(exchange, first)
                    response = await client.finish(left(call))
                else:
                    reply = Reply(exchange.head, await exchange.read())
                    if reply.status in _ELSEWHERE or (early is not None and reply.status != _OK):
                        self._leg.note_refusal(call, worker, reply)
                        return reply
                    client.add_timing(reply.head.get("Server-Timing"))
                    response = await client.refuse(reply, left(call))
        metrics.complete.observe(time.monotonic() - started)
        (metrics.errors if client.failed else metrics.completed).inc()
        return response

    def _note_fetched(self, exchange: Exchange) -> None:
        """A worker that computes the prompt may be one that cannot reach the context worker to tell it so."""
        fetched = exchange.head.find(_FETCHED)
        self._knows_fetched = fetched is not None
        if fetched == b"0" and self._release is not None:
            self._release(None)

    def _send(self, worker: WorkerView) -> Exchange:
        journal = self._journal if self._call.stream else None
        return self._leg.send(worker, self._call, self._body, journal=journal)

    async def _relay(self, exchange: Exchange, first: bytes) -> None:
        client = self._client
        self._is_beyond_repair = exchange.journal is None
        if not client.started:
            await client.start(first, exchange.head.get("Content-Type") or "text/event-stream")
        elif first:
            client.write(first)
        await exchange.relay(client)

    def _can_go_on(self, error: DiptychError) -> bool:
        """Whether another worker may be tried; if so, the leg is now what the client does not have yet."""
        call = self._call
        if self._is_beyond_repair or is_late(call, error):
            return False
        if not self._journal:
            return isinstance(error, WorkerLost)
        # A worker that fell silent counts as lost here: its stream goes on elsewhere.
        if self._resumes == 0:
            return False
        self._resumes -= 1
        try:
            so_far = read_journal(self._journal)
        except JournalError as malformed:
            _log.error("request %s cannot go on: %s", call.request_id, malformed)
            return False
        self._body = call.resumed_body(self._prefill, so_far)
        if self._release is not None:  # what has drawn tokens does not need its ticket any more
            self._release([index for index, choice in so_far.choices.items() if choice.token_ids])
        self._workers = self._choose(self._tried)
        self._leg.metrics.resumed.inc()
        num_tokens = sum(len(choice.token_ids) for choice in so_far.choices.values())
        _log.info("request %s: going on elsewhere after %d tokens", call.request_id, num_tokens)
        return True
