"""The router as an HTTP server: routes, limits, errors, start and graceful stop."""

import asyncio
import logging
import random
import signal
import time
from collections.abc import AsyncIterator

import orjson
from aiohttp import web

from diptych.discovery import Registry
from diptych.errors import (
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    StartupError,
)
from diptych.router.deadline import within
from diptych.router.downstream import Downstream
from diptych.router.flow import Flow
from diptych.router.frontends.openai import PATHS, parse_call, request_id_of
from diptych.router.metrics import Metrics, WorkerGauges
from diptych.router.pool import Pool
from diptych.router.registry_routes import RegistryRoutes, kept_here
from diptych.router.settings import Limits, RouterSettings
from diptych.router.status import StartGate, StatusPages, describe_missing, missing_roles
from diptych.trust import ClusterTrust

POOL = web.AppKey("pool", Pool)
METRICS = web.AppKey("metrics", Metrics)
_log = logging.getLogger(__name__)


def create_app(
    config: RouterSettings, registry: Registry, *, limits: Limits | None = None
) -> web.Application:
    """The application. Serve it with `handler_cancellation`, as `run` does: a client that goes away then
    cancels its legs at once, and not only at the next byte."""
    limits = limits or Limits()
    metrics = Metrics()
    minimal = config.minimal_instances
    pool = Pool(registry, limits, minimal=minimal)
    metrics.registry.register(WorkerGauges(pool))
    flow = Flow(pool, metrics, config, limits)
    edge = _Edge(flow, metrics, config, StartGate(pool, is_open=minimal is None))
    app = web.Application(client_max_size=config.max_body_bytes)
    app[POOL] = pool
    app[METRICS] = metrics
    app.add_routes([web.post(path, edge.serve) for path in PATHS])
    app.add_routes(StatusPages(pool, metrics, time.time).routes())
    kept = kept_here(registry)
    if kept is not None:
        app.add_routes(RegistryRoutes(kept, ClusterTrust(config.cluster_secret)).routes())
    app.router.add_route("*", "/{path:.*}", _nothing_here)

    async def lifetime(app: web.Application) -> AsyncIterator[None]:
        async with pool, flow:
            announcer = asyncio.create_task(_announce_readiness(pool, config.server_start_timeout_s))
            yield
            announcer.cancel()
            await asyncio.gather(announcer, return_exceptions=True)

    app.cleanup_ctx.append(lifetime)
    return app


async def run(
    config: RouterSettings,
    registry: Registry,
    *,
    limits: Limits | None = None,
    reuse_port: bool = False,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; then stop accepting and give running requests time to end."""
    limits = limits or Limits()
    loop = asyncio.get_running_loop()
    stop = stop or asyncio.Event()
    runner = web.AppRunner(
        create_app(config, registry, limits=limits),
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=config.server_keep_alive_timeout,
        shutdown_timeout=limits.shutdown_s,
    )
    await runner.setup()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        site = web.TCPSite(runner, config.hostname, config.port, backlog=2048, reuse_port=reuse_port or None)
        try:
            await site.start()
        except OSError as error:
            raise StartupError(
                f"Cannot listen on {config.hostname}:{config.port}: {error.strerror or error}."
            ) from error
        _log.info("router listens on %s:%d", config.hostname, config.port)
        await stop.wait()
        _log.info("router stops: running requests have %.0f s to end", limits.shutdown_s)
    finally:
        await runner.cleanup()
        for number in signals:
            loop.remove_signal_handler(number)


class _Edge:
    """Takes a request in, and sees to it that it ends in exactly one way."""

    def __init__(self, flow: Flow, metrics: Metrics, config: RouterSettings, gate: StartGate) -> None:
        self._flow = flow
        self._gate = gate
        self._metrics = metrics
        self._timeout_s = config.request_timeout_s
        self._max_body_bytes = config.max_body_bytes
        self._random = random.Random()  # seeded by the system; ids are unique, not secret

    async def serve(self, request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        unique_id = f"{self._random.getrandbits(128):032x}"
        request_id = request_id_of(request.headers) or unique_id
        client = Downstream(request, {"X-Request-ID": request_id})
        metrics = self._metrics
        metrics.requests.inc()
        try:
            self._gate.check()
            call = parse_call(
                request.path,
                request.headers,
                await self._read_body(request),
                request_id=request_id,
                unique_id=unique_id,
                arrived=arrived,
                timeout_s=self._timeout_s,
            )
            (metrics.stream_requests if call.stream else metrics.nonstream_requests).inc()
            response = await self._flow.run(call, client)
        except (asyncio.CancelledError, ConnectionResetError):
            metrics.cancelled.inc()
            _log.info("request %s: the client went away", request_id)
            raise
        except DiptychError as error:
            if isinstance(error, InvalidRequest):
                metrics.validation_errors.inc()
            _log.info("request %s: %d %s", request_id, error.status, error.message)
            response = await client.fail(error, 1.0)
        except Exception:
            metrics.internal_errors.inc()
            _log.exception("request %s: a fault of the router", request_id)
            response = await client.fail(DiptychError("The router failed; its log has the details."), 1.0)
        (metrics.http_errors if client.failed else metrics.responses).inc()
        _log.debug("request %s: %d, %.4f s", request_id, response.status, time.monotonic() - arrived)
        return response

    async def _read_body(self, request: web.Request) -> bytes:
        if (request.content_length or 0) > self._max_body_bytes:
            raise self._too_large()
        try:
            if request.content.is_eof():
                return await request.read()
            return await within(self._timeout_s, request.read())
        except web.HTTPRequestEntityTooLarge:
            raise self._too_large() from None
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"The request body did not arrive within {self._timeout_s:g} s.") from None

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"The request body is over the limit of {self._max_body_bytes} bytes.")


async def _nothing_here(request: web.Request) -> web.Response:
    """What no route takes. A middleware for it would cost every request."""
    for resource in request.app.router.resources():
        if resource.canonical == request.path:
            methods = ", ".join(sorted(route.method for route in resource))
            error: DiptychError = InvalidRequest(
                f"{request.path} does not take {request.method}; it takes {methods}."
            )
            return _error(error, status=405, headers={"Allow": methods})
    return _error(NotFound(f"There is nothing at {request.path}."), status=404, headers={})


def _error(error: DiptychError, *, status: int, headers: dict[str, str]) -> web.Response:
    body = orjson.dumps(error.body())
    return web.Response(status=status, body=body, headers=headers, content_type="application/json")


async def _announce_readiness(pool: Pool, timeout_s: float) -> None:
    """Say once that the mesh is ready; after the start timeout, say what it waits for and go on."""
    while not await pool.wait_until(lambda pool: not missing_roles(pool), timeout_s):
        _log.error("not ready after another %.0f s, still waiting: %s", timeout_s, describe_missing(pool))
    _log.info("ready: %s", ", ".join(f"{w.worker_id} ({w.info.role})" for w in pool.workers if w.ready))
