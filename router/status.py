"""What the router says of itself and of its workers: health, models, cluster, version, metrics."""

from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

import diptych
from diptych.discovery.address import parse_address
from diptych.errors import Unavailable
from diptych.router.metrics import Metrics
from diptych.router.pool import Pool
from diptych.router.worker_view import LegRole, WorkerView

_ROLES: tuple[LegRole, ...] = ("CONTEXT", "GENERATION")


class StatusPages:
    def __init__(self, pool: Pool, metrics: Metrics, wall_clock: Callable[[], float]) -> None:
        self._pool = pool
        self._metrics = metrics
        self._created = int(wall_clock())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/live", self.live),
            web.get("/version", self.version),
            web.get("/v1/models", self.models),
            web.get("/cluster_info", self.cluster_info),
            web.get("/metrics", self.prometheus),
            web.get("/prometheus/metrics", self.prometheus),
        ]

    async def health(self, request: web.Request) -> web.Response:
        missing = missing_roles(self._pool)
        if not missing:
            return _json({"status": "ok"})
        error = Unavailable(f"Not ready: {describe_missing(self._pool)}.", retry_after_s=1.0)
        return _json(error.body(), status=error.status, headers=error.headers())

    async def live(self, request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def version(self, request: web.Request) -> web.Response:
        return _json({"version": diptych.__version__})

    async def models(self, request: web.Request) -> web.Response:
        data = [
            {"id": name, "object": "model", "created": self._created, "owned_by": "diptych"}
            for name in self._pool.models()
        ]
        return _json({"object": "list", "data": data})

    async def cluster_info(self, request: web.Request) -> web.Response:
        workers = self._pool.workers
        return _json(
            {
                "is_ready": not missing_roles(self._pool),
                "current_workers": {
                    "context_servers": [_describe(w) for w in workers if w.has_role("CONTEXT")],
                    "generation_servers": [_describe(w) for w in workers if w.has_role("GENERATION")],
                },
                "minimal_instances": {
                    "context_servers": self._pool.minimal["CONTEXT"],
                    "generation_servers": self._pool.minimal["GENERATION"],
                },
            }
        )

    async def prometheus(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.text(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )


class StartGate:
    """Refuses requests until `minimal_instances` of each role have been ready together once.

    Later on a missing worker makes /health say so, but requests are served with those that are left.
    """

    def __init__(self, pool: Pool, *, is_open: bool) -> None:
        self._pool = pool
        self._is_open = is_open

    def check(self) -> None:
        if self._is_open:
            return
        if missing_roles(self._pool):
            raise Unavailable(f"Not ready: {describe_missing(self._pool)}.", retry_after_s=1.0)
        self._is_open = True


def missing_roles(pool: Pool) -> list[LegRole]:
    """Roles with fewer ready workers than it takes to be ready."""
    return [role for role in _ROLES if len(pool.ready(role)) < pool.minimal[role]]


def describe_missing(pool: Pool) -> str:
    """For each role without a ready worker, which workers there are and how they are."""
    parts = []
    for role in missing_roles(pool):
        states = [f"{w.worker_id} is {w.state}" for w in pool.workers if w.has_role(role)]
        known, minimal = ", ".join(states) or "none is known", pool.minimal[role]
        if minimal == 1:
            parts.append(f"no {role.lower()} worker is ready ({known})")
        else:
            count = len(pool.ready(role))
            parts.append(f"{count} of {minimal} {role.lower()} workers are ready ({known})")
    return "; ".join(parts)


def _describe(worker: WorkerView) -> dict[str, Any]:
    address = parse_address(worker.info.url)
    return {
        "worker_id": worker.worker_id,
        "host": address.host,
        "port": address.port,
        "role": worker.info.role,
        "state": worker.state,
        "models": list(worker.models),
        "in_flight": worker.in_flight,
    }


def _json(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=orjson.dumps(content), status=status, headers=headers, content_type="application/json"
    )
