"""What the router serves besides generation: pages and internal routes, each connection for one answer.

Generation never comes here: face.py takes it before.
"""

from collections.abc import Awaitable, Callable, Iterable

import orjson
from aiohttp import web

from diptych.errors import DiptychError, InvalidRequest, NotFound
from diptych.router.api_keys import ApiKeys
from diptych.router.frontends.openai import PATHS

_OPEN = frozenset(("/health", "/live", "/version", "/metrics", "/prometheus/metrics"))
_INTERNAL = "/internal/"  # guarded by the cluster's secret, and not by API keys

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(routes: Iterable[web.RouteDef], keys: ApiKeys, *, max_body_bytes: int) -> web.Application:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in _OPEN and not request.path.startswith(_INTERNAL):
            try:
                keys.check(request.headers.get("Authorization"))
            except DiptychError as error:
                return _error(error, status=error.status, headers=error.headers())
        return await handler(request)

    app = web.Application(client_max_size=max_body_bytes, middlewares=[guard])
    app.on_response_prepare.append(_close_after)
    app.add_routes(routes)
    app.router.add_route("*", "/{path:.*}", _nothing_here)
    return app


async def _close_after(request: web.Request, response: web.StreamResponse) -> None:
    response.force_close()
    response.headers["Connection"] = "close"  # aiohttp has written its headers before it asks us


async def _nothing_here(request: web.Request) -> web.Response:
    """What no route takes."""
    methods = {"POST"} if request.path in PATHS else set()
    for resource in request.app.router.resources():
        if resource.canonical == request.path:
            methods |= {route.method for route in resource}
    if not methods:
        return _error(NotFound(f"There is nothing at {request.path}."), status=404, headers={})
    allowed = ", ".join(sorted(methods))
    error = InvalidRequest(f"{request.path} does not take {request.method}; it takes {allowed}.")
    return _error(error, status=405, headers={"Allow": allowed})


def _error(error: DiptychError, *, status: int, headers: dict[str, str]) -> web.Response:
    body = orjson.dumps(error.body())
    return web.Response(status=status, body=body, headers=headers, content_type="application/json")
