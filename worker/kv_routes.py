"""The worker's endpoints for what is in its prefix cache (see kv_events.py)."""

import contextlib

import msgspec
import orjson
from aiohttp import web

from diptych.errors import InvalidRequest
from diptych.worker.keys import SERVICE

_MAX_WAIT_MS = 30_000
_DEFAULT_WAIT_MS = 10_000


async def kv_events(http: web.Request) -> web.Response:
    """`?epoch=E&since=N&wait_ms=T`: KvEvents as msgpack."""
    service = http.app[SERVICE]
    service.trust.check_secret(http.headers)  # who knows hashes can tell what others asked
    service.check_ready()
    epoch = http.query.get("epoch")
    position, wait_ms = _number(http, "since", 0), _number(http, "wait_ms", _DEFAULT_WAIT_MS)
    events = await service.kv_events.since(epoch, position, min(wait_ms, _MAX_WAIT_MS) / 1000)
    return web.Response(body=msgspec.msgpack.encode(events), content_type="application/msgpack")


async def kv_peer(http: web.Request) -> web.Response:
    """How `trtllm-serve doctor --peer` reaches this worker's KV pool, to measure the way to it."""
    service = http.app[SERVICE]
    service.trust.check_secret(http.headers)
    service.check_ready()
    return web.Response(body=service.ready.kv_peer, content_type="application/msgpack")


async def kv_cache_events(http: web.Request) -> web.Response:
    """TensorRT-LLM's events since the last call; none unless kv_cache_config.event_buffer_max_size is set."""
    service = http.app[SERVICE]
    service.trust.check_secret(http.headers)
    service.check_ready()
    return web.Response(body=orjson.dumps(service.kv_events.drain_buffer()), content_type="application/json")


def _number(http: web.Request, name: str, default: int) -> int:
    given = http.query.get(name)
    if given is None:
        return default
    with contextlib.suppress(ValueError):
        number = int(given)
        if number >= 0:
            return number
    raise InvalidRequest(f"{name} is {given!r}; it must be a whole number, 0 or more", param=name)
