"""One router process: pool, legs, public port, pages. Use as ``async with``; then give it listeners."""

import asyncio
import logging
import socket
import time
from types import TracebackType

from aiohttp import web

from diptych.discovery import Registry
from diptych.router.admission import Admission
from diptych.router.api_keys import ApiKeys
from diptych.router.app import create_app
from diptych.router.capacity import Capacity
from diptych.router.edge import Edge
from diptych.router.faces import Faces
from diptych.router.flow import Flow
from diptych.router.frontends.openai import PATHS
from diptych.router.metrics import AdmissionGauges, Metrics, WorkerGauges
from diptych.router.pool import Pool
from diptych.router.registry_routes import RegistryRoutes, kept_here
from diptych.router.settings import Limits, RouterSettings
from diptych.router.status import StartGate, StatusPages, describe_missing, missing_roles
from diptych.trust import ClusterTrust

_BACKLOG = 4096
_log = logging.getLogger(__name__)


class Router:
    def __init__(
        self,
        config: RouterSettings,
        registry: Registry,
        *,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._config = config
        self._limits = limits or Limits()
        self.metrics = metrics or Metrics()
        trust = ClusterTrust(config.cluster_secret)
        minimal = config.minimal_instances
        self.pool = Pool(registry, self._limits, minimal=minimal, headers=trust.headers())
        self.flow = Flow(self.pool, self.metrics, config, self._limits)
        capacity = Capacity(self.pool, config.max_concurrent_requests, num_processes=config.num_workers)
        self.admission = Admission(capacity.limit, capacity.max_waiting(config.max_queued_requests))
        self.metrics.add_gauges(WorkerGauges(self.pool), AdmissionGauges(self.admission, capacity.limit))
        keys = ApiKeys.from_settings(config.api_keys)
        kept = kept_here(registry)
        routes = StatusPages(self.pool, self.metrics, time.time).routes()
        routes += [] if kept is None else RegistryRoutes(kept, trust).routes()
        self._pages = web.AppRunner(
            create_app(routes, keys, max_body_bytes=config.max_body_bytes),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=self._limits.shutdown_s,
        )
        self._edge = Edge(
            self.flow,
            self.metrics,
            keys,
            self.admission,
            StartGate(self.pool, is_open=minimal is None),
            timeout_s=config.request_timeout_s,
        )
        self._faces: Faces | None = None
        self._servers: list[asyncio.Server] = []
        self._announcer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Router":
        await self._pages.setup()
        pages = self._pages.server
        assert pages is not None
        await self.pool.__aenter__()
        await self.flow.__aenter__()
        self._faces = Faces(
            self._edge,
            PATHS,
            pages,
            max_body_bytes=self._config.max_body_bytes,
            body_s=self._config.request_timeout_s,
            keep_alive_s=self._config.server_keep_alive_timeout,
        )
        self._announcer = asyncio.create_task(self._announce_readiness(), name="readiness")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        if self._announcer is not None:
            self._announcer.cancel()
            await asyncio.gather(self._announcer, return_exceptions=True)
        if self._faces is not None:
            await self._faces.close()
        await self._pages.cleanup()
        await self.flow.__aexit__(kind, error, trace)
        await self.pool.__aexit__(kind, error, trace)

    async def wait_for_first_look(self) -> None:
        """Until every worker that is announced has been asked how it is; bounded, for none may answer."""
        await self.pool.wait_until(
            lambda pool: bool(pool.workers) and all(worker.probed for worker in pool.workers),
            2 * self._limits.probe_s,
        )

    async def listen(self, listener: socket.socket) -> None:
        """Take connections from a listening socket; its owner may share it with other processes."""
        assert self._faces is not None
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_server(self._faces, sock=listener, backlog=_BACKLOG))

    async def drain(self, *, has_successor: bool) -> None:
        """Accept nothing more; let what runs end, within the limits.

        `has_successor`: somebody else accepts, so that clients go on and must not see a connection break.
        """
        for server in self._servers:
            server.close()
        self._servers.clear()
        assert self._faces is not None
        _log.info(
            "router stops: %d running requests have %.0f s to end",
            self._faces.num_running,
            self._limits.shutdown_s,
        )
        await self._faces.drain(self._limits.shutdown_s, keep_idle=has_successor)

    async def _announce_readiness(self) -> None:
        """Say once that the mesh is ready; after the start timeout, say what it waits for and go on."""
        pool, timeout_s = self.pool, self._config.server_start_timeout_s
        while not await pool.wait_until(lambda pool: not missing_roles(pool), timeout_s):
            _log.error("not ready after another %.0f s, still waiting: %s", timeout_s, describe_missing(pool))
        _log.info("ready: %s", ", ".join(f"{w.worker_id} ({w.info.role})" for w in pool.workers if w.ready))
