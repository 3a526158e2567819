"""The HTTP side of one worker: a complete OpenAI server, whose endpoints also run legs of disaggregated requests."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, get_args

import msgspec
import orjson
from aiohttp import web

from diptych import __version__
from diptych.config import LlmConfig
from diptych.errors import DiptychError, InvalidRequest, NotFound, PayloadTooLarge
from diptych.wire import Role
from diptych.worker.keys import SERVICE
from diptych.worker.kv_routes import kv_cache_events, kv_events, kv_peer
from diptych.worker.registration import registered
from diptych.worker.responder import chat, complete, probe, tokenize
from diptych.worker.service import WorkerService

log = logging.getLogger(__name__)

_JSON = "application/json"
_HEALTH_TIMEOUT_S = 30.0


class _Release(msgspec.Struct):
    """What /kv/release takes: tickets, or context legs by their request's id (see handed_out.py).

    `incarnation`: of the process that is meant; another one at its address has nothing to return.
    """

    ticket_ids: list[str] = []
    disagg_request_ids: list[str | int] = []
    incarnation: str = ""


class _RoleChange(msgspec.Struct):
    role: Role


def run(config: LlmConfig) -> None:
    """Serve until SIGTERM or SIGINT; StartupError when that cannot begin."""
    try:
        import uvloop
    except ImportError:
        code = asyncio.run(_serve(config))
    else:
        code = uvloop.run(_serve(config))
    if code:
        sys.exit(code)


def create_app(service: WorkerService) -> web.Application:
    app = web.Application(client_max_size=service.config.max_body_bytes, middlewares=[_errors])
    app[SERVICE] = service
    app.add_routes(
        [
            web.post("/v1/completions", complete),
            web.post("/v1/chat/completions", chat),
            web.post("/tokenize", tokenize),
            web.get("/v1/models", _models),
            web.get("/health", _health),
            web.get("/health_generate", _health_generate),
            web.get("/live", _live),
            web.get("/version", _version),
            web.get("/server_info", _server_info),
            web.get("/metrics", _metrics),
            web.get("/prometheus/metrics", _prometheus),
            web.get("/perf_metrics", _perf_metrics),
            web.post("/kv/release", _release),
            web.post("/drain", _drain),
            web.post("/role", _role),
            web.get("/kv_events", kv_events),
            web.get("/kv/peer", kv_peer),
            web.post("/kv_cache_events", kv_cache_events),
        ]
    )
    return app


async def _serve(config: LlmConfig) -> int:
    assert config.listen_fd is not None, "the command line opens the listener"
    service = WorkerService(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, service.request_drain, signal.Signals(number).name)
    # A client that goes away cancels its handler, and that its sequences.
    runner = web.AppRunner(create_app(service), handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        # The port answers while the model loads, with 503: who asks learns that somebody is at home.
        await web.SockSite(runner, socket.socket(fileno=os.dup(config.listen_fd))).start()
        async with registered(service):
            return await _until_stopped(service)
    finally:
        await service.close()
        await runner.cleanup()


async def _until_stopped(service: WorkerService) -> int:
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(service.stopping.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return 0
        starting.result()
        config = service.config
        log.info("serving %s on http://%s:%d", config.model_name, config.host, config.port)
        waits: set[asyncio.Future[Any]] = {stopping, service.engine.died}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not service.engine.died.done():
            await service.drain()
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
    if service.engine.died.done():
        log.error("the engine process ended with exit code %d: stopping", service.engine.died.result())
        await asyncio.sleep(0)  # its open requests have their error events: let the handlers send them
        return 1
    return 0


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every failure before the first byte becomes one OpenAI error body."""
    try:
        return await handler(request)
    except DiptychError as error:
        failure = error
    except web.HTTPRequestEntityTooLarge:
        limit = request.app[SERVICE].config.max_body_bytes
        failure = PayloadTooLarge(f"the body is larger than {limit} bytes")
    except web.HTTPNotFound:
        failure = NotFound(f"there is no {request.path} here")
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        failure = InvalidRequest(f"{request.method} {request.path} is not possible; allowed: {allowed}")
        return _error_response(failure, status=405)
    except web.HTTPException:
        raise
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        failure = DiptychError("internal error; the worker's log has the details")
    return _error_response(failure)


def _error_response(error: DiptychError, status: int | None = None) -> web.Response:
    return web.Response(
        body=orjson.dumps(error.body()),
        status=status or error.status,
        content_type=_JSON,
        headers=error.headers(),
    )


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type=_JSON)


async def _models(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    entry = {
        "id": service.config.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "diptych",
    }
    return _json({"object": "list", "data": [entry]})


async def _health(request: web.Request) -> web.Response:
    request.app[SERVICE].check_ready()
    return web.Response()


async def _health_generate(request: web.Request) -> web.Response:
    """Really draw one token."""
    service = request.app[SERVICE]
    service.check_ready()
    await asyncio.wait_for(probe(service), _HEALTH_TIMEOUT_S)
    return web.Response()


async def _live(request: web.Request) -> web.Response:
    return web.Response()


async def _version(request: web.Request) -> web.Response:
    return _json({"version": __version__})


async def _server_info(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    service.check_responsive()
    return _json(service.server_info())


async def _metrics(request: web.Request) -> web.Response:
    """Statistics of the steps since the last call, as in TensorRT-LLM; Prometheus text is elsewhere."""
    service = request.app[SERVICE]
    entries = list(service.iterations)
    service.iterations.clear()
    return _json(entries)


async def _prometheus(request: web.Request) -> web.Response:
    body = request.app[SERVICE].metrics.render()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def _perf_metrics(request: web.Request) -> web.Response:
    """Where the time of the last requests went; `?request_id=` for one of them."""
    entries = list(request.app[SERVICE].perf)
    wanted = request.query.get("request_id")
    return _json([entry for entry in entries if wanted in (None, entry["request_id"])])


async def _release(request: web.Request) -> web.Response:
    """Return the blocks of tickets that no generation worker will fetch."""
    service = request.app[SERVICE]
    service.trust.check_secret(request.headers)
    try:
        wanted = msgspec.json.decode(await request.read(), type=_Release)
    except msgspec.DecodeError:
        raise InvalidRequest(
            'the body must be {"ticket_ids": [string, ...], "disagg_request_ids": [id, ...], "incarnation": string}',
            param="ticket_ids",
        ) from None
    if not service.is_loaded:  # meant for who had this address before
        return _json({"released": 0})
    ticket_ids = [*wanted.ticket_ids]
    if wanted.incarnation in ("", service.incarnation):
        for request_id in wanted.disagg_request_ids:
            ticket_ids += service.handed_out.revoke(request_id)
    for ticket_id in ticket_ids:
        service.engine.release(ticket_id)
    return _json({"released": len(ticket_ids)})


async def _drain(request: web.Request) -> web.Response:
    """Leave the mesh: what runs ends, then the process does."""
    service = request.app[SERVICE]
    service.trust.check(request.remote, request.headers)
    service.request_drain("POST /drain")
    held = service.engine.stats.leased_blocks if service.is_loaded else 0
    return _json(
        {
            "worker_id": service.worker_id,
            "state": service.state,
            "open_requests": service.open_requests,
            "held_blocks": held,
        },
        status=202,
    )


async def _role(request: web.Request) -> web.Response:
    """Take other legs from now on. Routers learn it from the registry."""
    service = request.app[SERVICE]
    service.trust.check(request.remote, request.headers)
    try:
        wanted = msgspec.json.decode(await request.read(), type=_RoleChange)
    except msgspec.DecodeError:
        allowed = ", ".join(get_args(Role))
        raise InvalidRequest(f'the body must be {{"role": R}}, R one of {allowed}', param="role") from None
    service.change_role(wanted.role)
    return _json({"worker_id": service.worker_id, "role": service.role})
