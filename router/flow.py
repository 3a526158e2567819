"""The two legs of one request (docs/protocol.md): context, first token to the client, generation, stream.

    context leg      fails before its answer -> another context worker; none left -> a generation worker
                     does the whole request
    between          the tickets are ours: returned when no generation worker begins to answer
    generation leg   fails before its first byte -> another generation worker, then a context worker
    stream           fails later -> one error event and [DONE]

Cancellation (the client went away) closes the connection of the leg that runs, and with it the leg.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from http import HTTPStatus
from types import TracebackType

import msgspec
import orjson
from aiohttp import web

from diptych.errors import DiptychError, ModelNotFound, Unavailable, WorkerLost
from diptych.router.downstream import Downstream
from diptych.router.exchange import Exchange, Reply
from diptych.router.frontends.openai import Call, Prefill, client_answer, parse_prefill
from diptych.router.metrics import LegMetrics, Metrics
from diptych.router.policies import load_policy
from diptych.router.pool import LegRole, Pool, WorkerView
from diptych.router.settings import Limits, RouterSettings

_log = logging.getLogger(__name__)

_ELSEWHERE = {500, 502, 503}  # statuses of a generation leg that another worker may do better


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
        self._policies = {
            "CONTEXT": load_policy(settings.context_servers.router.type),
            "GENERATION": load_policy(settings.generation_servers.router.type),
        }
        self._background: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Flow":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*self._background)

    async def run(self, call: Call, client: Downstream) -> web.StreamResponse:
        self._check_model(call.model)
        try:
            context = await self._context_leg(call, client)
        except Unavailable as error:
            workers = self._workers(call.model, "GENERATION")
            return await self._final_leg(call, client, call.body, workers, error)
        if isinstance(context, Reply):
            return client.pass_on(context)
        client.set_header("X-Diptych-Context-Worker", context.worker.worker_id)
        handed_over = False
        try:
            if call.stream and context.prefill.stream_head:
                await client.start(context.prefill.stream_head.encode())
            if context.prefill.finished:
                handed_over = True  # nothing is held for a sequence that has ended
                if client.started:
                    return await client.finish(_left(call))
                return client.answer(HTTPStatus.OK, client_answer(context.body))
            model = call.model or next(iter(context.worker.models), None)  # both legs: one model
            workers = self._workers(model, "GENERATION", "CONTEXT")
            body = call.generation_body(context.prefill)
            response = await self._final_leg(call, client, body, workers, None)
            handed_over = not client.failed
            return response
        finally:
            if not handed_over:
                self._release(call, context)

    async def _context_leg(self, call: Call, client: Downstream) -> ContextResult | Reply:
        """Raises Unavailable when no worker could be had. A Reply is a worker's error, for the client."""
        failure: Unavailable | None = None
        body = call.context_body()
        metrics = self._metrics.context
        started = time.monotonic()
        self._metrics.queue_latency.observe(started - call.arrived)
        client.add_timing(f"router_queue;dur={(started - call.arrived) * 1000:.2f}")
        for attempt, worker in enumerate(self._workers(call.model, "CONTEXT")):
            _count_attempt(metrics, attempt)
            try:
                with worker:
                    async with self._post(worker, call, body) as exchange:
                        reply = Reply(exchange.head, await exchange.read())
            except DiptychError as error:
                failure = self._lost("context", call, worker, error)
                continue
            if reply.status == HTTPStatus.OK:
                elapsed_s = time.monotonic() - started
                metrics.completed.inc()
                metrics.first_token.observe(elapsed_s)
                metrics.complete.observe(elapsed_s)
                client.add_timing(reply.head.text("server-timing"))
                client.add_timing(f"ctx_leg;dur={elapsed_s * 1000:.2f}")
                return ContextResult(worker, _prefill_of(worker, reply), reply.body)
            metrics.errors.inc()
            if reply.status != HTTPStatus.SERVICE_UNAVAILABLE:
                return reply
            failure = _unavailable(worker, reply)
            _log.info("request %s: context worker %s answers 503", call.request_id, worker.worker_id)
        raise failure or self._nobody("context")

    async def _final_leg(
        self,
        call: Call,
        client: Downstream,
        body: bytes,
        workers: Iterator[WorkerView],
        failure: DiptychError | Reply | None,
    ) -> web.StreamResponse:
        """The leg that the client's answer comes from. `failure`: what it gets when there are no workers."""
        metrics = self._metrics.generation
        for attempt, worker in enumerate(workers):
            _count_attempt(metrics, attempt)
            started = time.monotonic()
            try:
                with worker:
                    async with self._post(worker, call, body) as exchange:
                        if exchange.status == HTTPStatus.OK and call.stream:
                            first = await exchange.first()
                            metrics.first_token.observe(time.monotonic() - started)
                            response = await self._relay(call, client, worker, exchange, first)
                            return self._ended(client, started, response)
                        reply = Reply(exchange.head, await exchange.read())
            except DiptychError as error:
                failure = self._lost("generation", call, worker, error)
                continue
            if reply.status in _ELSEWHERE:
                metrics.errors.inc()
                failure = reply
                _log.warning(
                    "request %s: generation leg: worker %s answers %d",
                    call.request_id,
                    worker.worker_id,
                    reply.status,
                )
                continue
            client.add_timing(reply.head.text("server-timing"))
            if client.started:
                metrics.errors.inc()
                return await client.refuse(reply, _left(call))
            return self._ended(client, started, client.pass_on(reply))
        if isinstance(failure, Reply):
            return await client.refuse(failure, _left(call))
        return await client.fail(failure or self._nobody("generation"), _left(call))

    async def _relay(
        self, call: Call, client: Downstream, worker: WorkerView, exchange: Exchange, first: bytes
    ) -> web.StreamResponse:
        """From the first byte on nothing can be taken back: an error ends the stream."""
        try:
            if client.started:
                if first:
                    client.write(first)
            else:
                content_type = exchange.head.text("content-type") or "text/event-stream"
                await client.start(first, content_type)
            await exchange.relay(client)
        except DiptychError as error:
            if isinstance(error, WorkerLost):
                self._pool.report_lost(worker, error)
            _log.warning("request %s: the stream broke off: %s", call.request_id, error.message)
            return await client.fail(error, _left(call))
        return await client.finish(_left(call))

    def _post(self, worker: WorkerView, call: Call, body: bytes) -> Exchange:
        now = time.monotonic()
        return worker.client.exchange(
            "POST", call.path, deadline=call.deadline, headers=call.headers(now), body=body
        )

    def _workers(self, model: str | None, *roles: LegRole) -> Iterator[WorkerView]:
        """Workers to try, each once; who is ready is looked up when the next one is asked for."""
        tried: set[str] = set()
        for role in roles:
            for _ in range(self._attempts):
                ready = self._pool.ready(role, model)
                candidates = [worker for worker in ready if worker.worker_id not in tried] if tried else ready
                if not candidates:
                    break
                worker = self._policies[role].pick(candidates)
                tried.add(worker.worker_id)
                yield worker

    def _check_model(self, model: str | None) -> None:
        if model is None or any(worker.serves(model) for worker in self._pool.workers):
            return
        names = self._pool.models()
        if names:
            listed = ", ".join(repr(name) for name in names)
            raise ModelNotFound(f"The model {model!r} does not exist; there is: {listed}.", param="model")

    def _nobody(self, leg: str) -> Unavailable:
        return Unavailable(f"No {leg} worker is ready.", retry_after_s=self._limits.probe_retry_s)

    def _lost(self, leg: str, call: Call, worker: WorkerView, error: DiptychError) -> WorkerLost:
        """Note a failed leg. Only a lost worker leaves time to try another: other errors go on."""
        (self._metrics.context if leg == "context" else self._metrics.generation).errors.inc()
        if not isinstance(error, WorkerLost):
            raise error
        self._pool.report_lost(worker, error)
        _log.warning("request %s: %s leg: %s", call.request_id, leg, error.message)
        return error

    def _ended(self, client: Downstream, started: float, response: web.StreamResponse) -> web.StreamResponse:
        metrics = self._metrics.generation
        metrics.complete.observe(time.monotonic() - started)
        (metrics.errors if client.failed else metrics.completed).inc()
        return response

    def _release(self, call: Call, context: ContextResult) -> None:
        """Return the blocks of tickets that nobody will fetch."""
        task = asyncio.create_task(self._post_release(call, context), name=f"release-{call.request_id}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _post_release(self, call: Call, context: ContextResult) -> None:
        try:
            ticket_ids = context.prefill.ticket_ids()
            if not ticket_ids:
                return
            now = time.monotonic()
            reply = await context.worker.client.request(
                "POST",
                "/kv/release",
                deadline=now + self._limits.release_s,
                headers=call.headers(now),
                body=orjson.dumps({"ticket_ids": ticket_ids}),
            )
        except (DiptychError, msgspec.DecodeError) as error:
            _log.warning("request %s: its tickets wait for their lease to end: %s", call.request_id, error)
            return
        self._metrics.released.inc(len(ticket_ids))
        _log.info("request %s: tickets released, status %d", call.request_id, reply.status)


def _left(call: Call) -> float:
    """Seconds for the last bytes to reach the client: a little even when the deadline is what ended it."""
    return max(1.0, call.deadline - time.monotonic())


def _count_attempt(metrics: LegMetrics, attempt: int) -> None:
    metrics.total.inc()
    if attempt:
        metrics.retries.inc()


def _prefill_of(worker: WorkerView, reply: Reply) -> Prefill:
    try:
        return parse_prefill(reply.body)
    except msgspec.DecodeError as error:
        raise DiptychError(
            f"The context worker at {worker.client.url} does not answer as one: {error}."
        ) from None


def _unavailable(worker: WorkerView, reply: Reply) -> Unavailable:
    """A worker's 503, with its reason when it gives one."""
    try:
        error = orjson.loads(reply.body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        message, code = f"The worker at {worker.client.url} answers 503.", None
    retry_after = reply.head.text("retry-after") or ""
    return Unavailable(
        message, code=code, retry_after_s=float(retry_after) if retry_after.isdigit() else None
    )
