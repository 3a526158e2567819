"""The two legs of one request (docs/protocol.md): context, first token to the client, generation, stream.

    context leg   fails, or its worker's line is full -> another context worker
                  none left -> the final leg does the whole request; full everywhere -> the client's 429
    early leg     with schedule_style generation_first: the generation leg, sent beside the first context leg
    between       the tickets are ours: returned unless a generation worker has fetched their blocks
    final leg     generation, or all of it; final_leg.py says what happens when it fails

Cancellation (the client went away) closes the connections of the legs that run, and with them the legs. Whatever
the context leg had given away by then is returned in the background, which no cancellation reaches.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Any

import msgspec
import orjson

from diptych.errors import DiptychError, ModelNotFound, Unavailable, WorkerLost
from diptych.router.downstream import Answered, Downstream
from diptych.router.early_leg import EarlyLeg
from diptych.router.exchange import Reply
from diptych.router.final_leg import ChooseWorkers, FinalLeg
from diptych.router.frontends.openai import Call, Prefill, client_answer, parse_prefill
from diptych.router.leg import Leg, left, unavailable
from diptych.router.metrics import Metrics
from diptych.router.pool import Pool
from diptych.router.routing import Route, Routing
from diptych.router.settings import Limits, RouterSettings
from diptych.router.worker_view import LegRole, WorkerView

_log = logging.getLogger(__name__)
_OK = (
    HTTPStatus.OK
)  # to look up a member of an enumeration costs as much as a regular expression in Python 3.11


class ContextResult(msgspec.Struct, frozen=True):
    worker: WorkerView
    prefill: Prefill
    body: bytes


class Flow:
    """Use as ``async with``: leaving waits for the releases that are under way."""

    def __init__(self, pool: Pool, metrics: Metrics, settings: RouterSettings, limits: Limits) -> None:
        self._pool = pool
        self._metrics = metrics
        self._limits = limits
        self._attempts = 1 + settings.max_retries
        self._generation_first = settings.schedule_style == "generation_first"
        self._context = Leg("CONTEXT", pool, metrics.context)
        self._generation = Leg("GENERATION", pool, metrics.generation)
        self._routing = Routing(pool, metrics, settings)
        self._background: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Flow":
        await self._routing.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._routing.__aexit__(kind, error, trace)
        await asyncio.gather(*self._background)

    async def run(self, call: Call, client: Downstream) -> Answered:
        self._check_model(call.model)
        with await self._routing.route(call) as route:
            if route.stays_local():
                workers = partial(self._workers, route, call.model, ("GENERATION", "CONTEXT"))
                return await self._final_leg(route.call, client, workers).run(None)
            async with EarlyLeg(self._generation, route) as early:
                return await self._both_legs(route, client, early)

    async def _both_legs(self, route: Route, client: Downstream, early: EarlyLeg) -> Answered:
        call = route.call
        try:
            context = await self._context_leg(route, client, early)
        except Unavailable as error:
            await early.cancel()
            workers = partial(self._workers, route, call.model, ("GENERATION", "CONTEXT"))
            return await self._final_leg(call, client, workers).run(error)
        if isinstance(context, Reply):
            return client.pass_on(context)
        route.end()
        client.set_header("X-Diptych-Context-Worker", context.worker.worker_id)
        settled = False
        try:
            if call.stream and context.prefill.stream_head:
                await client.start(context.prefill.stream_head.encode())
            if context.prefill.finished:
                settled = True  # nothing is held for a sequence that has ended
                if client.started:
                    return await client.finish(left(call))
                return client.answer(_OK, client_answer(context.body))
            model = call.model or next(iter(context.worker.models), None)  # both legs: one model
            workers = partial(self._workers, route, model, ("GENERATION", "CONTEXT"))
            final = self._final_leg(call, client, workers, context, early)
            response = await final.run(None)
            settled = final.tickets_are_settled
            return response
        finally:
            if not settled:
                self._release(call, context, None)

    def _final_leg(
        self,
        call: Call,
        client: Downstream,
        workers: ChooseWorkers,
        context: ContextResult | None = None,
        early: EarlyLeg | None = None,
    ) -> FinalLeg:
        return FinalLeg(
            self._generation,
            self._pool,
            call,
            client,
            workers,
            resumes=self._attempts - 1 + len(self._pool.workers),
            wait_s=self._limits.resume_wait_s,
            prefill=None if context is None else context.prefill,
            release=None if context is None else partial(self._release, call, context),
            early=early,
        )

    async def _context_leg(self, route: Route, client: Downstream, early: EarlyLeg) -> ContextResult | Reply:
        """Raises Unavailable when no worker could be had. A Reply is a worker's error, for the client."""
        call = route.call
        failure: Unavailable | None = None
        overloaded: Reply | None = None
        leg = self._context
        started = time.monotonic()
        self._metrics.queue_latency.observe(started - call.arrived)
        client.add_timing(f"router_queue;dur={(started - call.arrived) * 1000:.2f}")
        for attempt, worker in enumerate(self._workers(route, call.model, ("CONTEXT",), set())):
            leg.count_attempt(attempt)
            if attempt:
                await early.cancel()  # it follows the worker before
            followed = attempt == 0 and self._send_early(early, worker, call)
            try:
                with worker:
                    async with leg.send(worker, call, call.context_body(followed=followed)) as exchange:
                        reply = Reply(exchange.head, await exchange.read())
            except (DiptychError, asyncio.CancelledError) as error:
                self._revoke(call, worker)  # its answer may have been on the way
                if isinstance(error, asyncio.CancelledError):
                    raise
                leg.note_failure(call, worker, error)
                if not isinstance(error, WorkerLost):
                    raise
                failure = error
                continue
            if reply.status == _OK:
                elapsed_s = time.monotonic() - started
                leg.metrics.completed.inc()
                leg.metrics.first_token.observe(elapsed_s)
                leg.metrics.complete.observe(elapsed_s)
                client.add_timing(reply.head.get("Server-Timing"))
                client.add_timing(f"ctx_leg;dur={elapsed_s * 1000:.2f}")
                return ContextResult(worker, _prefill_of(worker, reply), reply.body)
            leg.note_refusal(call, worker, reply)
            if reply.status == HTTPStatus.TOO_MANY_REQUESTS:
                overloaded = reply
            elif reply.status == HTTPStatus.SERVICE_UNAVAILABLE:
                failure = unavailable(worker, reply)
            else:
                return reply
        if overloaded is not None:  # not one for the generation workers: they have their own lines
            return overloaded
        raise failure or leg.nobody(self._limits.probe_retry_s)

    def _send_early(self, early: EarlyLeg, context: WorkerView, call: Call) -> bool:
        if not self._generation_first:
            return False
        model = call.model or next(iter(context.models), None)
        return early.send(context, self._pool.unhindered(self._pool.ready("GENERATION", model)))

    def _workers(
        self, route: Route, model: str | None, roles: tuple[LegRole, ...], tried: set[str]
    ) -> Iterator[WorkerView]:
        """Workers to try, each once, and none of `tried`; who is ready is looked up when one is asked for."""
        for role in roles:
            for _ in range(self._attempts):
                ready = self._pool.ready(role, model)
                candidates = [worker for worker in ready if worker.worker_id not in tried] if tried else ready
                if not candidates:
                    break
                worker = route.pick(role, self._pool.unhindered(candidates))
                tried.add(worker.worker_id)
                yield worker

    def _check_model(self, model: str | None) -> None:
        pool = self._pool
        if model is None or pool.ready("GENERATION", model) or any(w.serves(model) for w in pool.workers):
            return
        names = self._pool.models()
        if names:
            listed = ", ".join(repr(name) for name in names)
            raise ModelNotFound(f"The model {model!r} does not exist; there is: {listed}.", param="model")

    def _release(self, call: Call, context: ContextResult, indices: Iterable[int] | None) -> None:
        """Return the blocks of tickets that nobody will fetch: of these choices, or of all."""
        try:
            ticket_ids = context.prefill.ticket_ids(indices)
        except msgspec.DecodeError as error:
            _log.warning("request %s: its tickets wait for their lease to end: %s", call.request_id, error)
            return
        if ticket_ids:
            self._metrics.released.inc(len(ticket_ids))
            self._post_release(call, context.worker, {"ticket_ids": ticket_ids})

    def _revoke(self, call: Call, worker: WorkerView) -> None:
        """Return whatever the context leg of this request got from the worker, or gets yet."""
        what = {"disagg_request_ids": [call.unique_id], "incarnation": worker.info.incarnation}
        self._post_release(call, worker, what)

    def _post_release(self, call: Call, worker: WorkerView, what: dict[str, Any]) -> None:
        async def post() -> None:
            now = time.monotonic()
            try:
                reply = await worker.client.request(
                    "POST",
                    "/kv/release",
                    deadline=now + self._limits.release_s,
                    headers=call.headers(now),
                    body=orjson.dumps(what),
                )
            except DiptychError as error:
                _log.info(
                    "request %s: its tickets wait for their lease to end: %s", call.request_id, error.message
                )
                return
            _log.info("request %s: tickets returned, status %d", call.request_id, reply.status)

        task = asyncio.create_task(post(), name=f"release-{call.request_id}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _prefill_of(worker: WorkerView, reply: Reply) -> Prefill:
    try:
        return parse_prefill(reply.body)
    except msgspec.DecodeError as error:
        raise DiptychError(
            f"The context worker at {worker.client.url} does not answer as one: {error}."
        ) from None
