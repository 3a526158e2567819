"""The HTTP face of the registry that this router keeps; diptych/discovery/embedded_client.py is the other side."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus

import msgspec
from aiohttp import web

from diptych.discovery import Registry
from diptych.discovery.address import parse_address
from diptych.discovery.embedded import EmbeddedRegistry
from diptych.discovery.embedded_client import PATH, Announced
from diptych.discovery.merged import MergedRegistry
from diptych.errors import ConfigError, DiptychError, InvalidRequest, NotFound
from diptych.trust import ClusterTrust
from diptych.wire import WorkerInfo

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RegistryRoutes:
    def __init__(self, registry: EmbeddedRegistry, trust: ClusterTrust) -> None:
        self._registry = registry
        self._trust = trust

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(PATH, self._guarded(self._list)),
            web.put(PATH + "/{worker_id}", self._guarded(self._announce)),
            web.delete(PATH + "/{worker_id}", self._guarded(self._withdraw)),
        ]

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._trust.check(request.remote, request.headers)
                return await handler(request)
            except ConfigError as error:
                return _answer(error.body(), HTTPStatus.CONFLICT)
            except DiptychError as error:
                return _answer(error.body(), error.status)

        return guarded

    async def _list(self, request: web.Request) -> web.Response:
        return _answer(self._registry.snapshot())

    async def _announce(self, request: web.Request) -> web.Response:
        try:
            info = msgspec.json.decode(await request.read(), type=WorkerInfo)
            parse_address(info.url)
        except (msgspec.DecodeError, ConfigError) as error:
            raise InvalidRequest(f"The body must be a WorkerInfo object: {error}.") from None
        if info.worker_id != request.match_info["worker_id"]:
            named = request.match_info["worker_id"]
            raise InvalidRequest(
                f"worker_id is {info.worker_id!r} in the body and {named!r} in the path.", param="worker_id"
            )
        if not self._registry.announce(info):
            return _answer(NotFound(f"The worker {info.worker_id!r} was taken out.").body(), HTTPStatus.GONE)
        return _answer(Announced(heartbeat_interval_s=self._registry.heartbeat_interval_s))

    async def _withdraw(self, request: web.Request) -> web.Response:
        worker_id = request.match_info["worker_id"]
        if not self._registry.withdraw(worker_id):
            raise NotFound(f"There is no worker {worker_id!r}.", param="worker_id")
        return _answer({"worker_id": worker_id})


def kept_here(registry: Registry) -> EmbeddedRegistry | None:
    """The part of a registry that this router keeps, if any."""
    if isinstance(registry, MergedRegistry):
        registry = registry.registry
    return registry if isinstance(registry, EmbeddedRegistry) else None


def _answer(content: object, status: int = HTTPStatus.OK) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type="application/json")
