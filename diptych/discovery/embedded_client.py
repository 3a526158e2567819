"""A worker's side of the registry that a router keeps (embedded.py), over HTTP.

    PUT    /internal/registry/workers/<id>   WorkerInfo: announce, heartbeat and update in one
    DELETE /internal/registry/workers/<id>   leave
    GET    /internal/registry/workers        the list

A PUT is answered with the interval of heartbeats that the router wants, or with 410 for a worker that
somebody took out. A router that cannot be reached is asked again after 50 ms to 1 s, for ever.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from urllib.parse import quote

import aiohttp
import msgspec

from diptych.discovery import Snapshot
from diptych.errors import ConfigError
from diptych.wire import WorkerInfo

PATH = "/internal/registry/workers"
_CALL_S = 3.0
_RETRY_S, _RETRY_MAX_S = 0.05, 1.0
_log = logging.getLogger(__name__)


class Announced(msgspec.Struct, frozen=True):
    """The answer to a PUT."""

    heartbeat_interval_s: float


class RouterUnreachable(Exception):
    """The router that keeps the registry did not do what was asked."""


class RemoteRegistry:
    """`headers` are sent with every request (see diptych.trust)."""

    def __init__(self, url: str, *, headers: Mapping[str, str]) -> None:
        self.url = url.rstrip("/")
        self._headers = headers
        self._session: aiohttp.ClientSession | None = None
        self._leases: set[RemoteLease] = set()
        self._closed = asyncio.Event()

    async def register(self, info: WorkerInfo) -> "RemoteLease":
        """Returns after the first attempt; one that failed is repeated in the background."""
        lease = RemoteLease(self, info)
        self._leases.add(lease)
        await lease.announced()
        return lease

    async def watch(self) -> AsyncIterator[Snapshot]:
        """Asks once a second: workers do not need the list, and routers have it."""
        shown: Snapshot | None = None
        while not self._closed.is_set():
            try:
                body = await self.ask("GET", PATH)
                snapshot = msgspec.json.decode(body, type=Snapshot)
            except (RouterUnreachable, msgspec.DecodeError) as error:
                _log.warning(
                    "the registry at %s cannot be read; the last snapshot stays: %s", self.url, error
                )
            else:
                if snapshot != shown:
                    shown = snapshot
                    yield snapshot
            waiting = asyncio.ensure_future(self._closed.wait())
            try:
                await asyncio.wait((waiting,), timeout=_RETRY_MAX_S)
            finally:
                waiting.cancel()

    async def close(self) -> None:
        self._closed.set()
        await asyncio.gather(*(lease.stop() for lease in self._leases))
        if self._session is not None:
            await self._session.close()

    async def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Raises RouterUnreachable, Removed or ConfigError."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=_CALL_S)
            self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        try:
            async with self._session.request(method, self.url + path, data=body) as response:
                answer = await response.read()
                status = response.status
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise RouterUnreachable(str(error) or type(error).__name__) from error
        if status == HTTPStatus.GONE:
            raise Removed
        if status == HTTPStatus.CONFLICT:
            raise ConfigError(_message(answer))
        if status != HTTPStatus.OK:
            raise RouterUnreachable(f"status {status}: {_message(answer)}")
        return answer


class Removed(Exception):
    """Somebody took the worker out of the registry."""


class RemoteLease:
    def __init__(self, registry: RemoteRegistry, info: WorkerInfo) -> None:
        self.removed = asyncio.Event()
        self._registry = registry
        self._info = info
        self._path = f"{PATH}/{quote(info.worker_id, safe=':')}"
        self._left = False
        self._wake = asyncio.Event()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name=f"lease-{info.worker_id}")

    async def announced(self) -> None:
        """Wait for the end of the first attempt; ConfigError when the id is another worker's."""
        await asyncio.shield(self._first)

    async def update(self, info: WorkerInfo) -> None:
        if info.worker_id != self._info.worker_id:
            raise ValueError(f"this lease is for {self._info.worker_id!r}, not {info.worker_id!r}")
        self._info = info
        self._wake.set()

    async def close(self) -> None:
        await self.stop()
        if self._left or self.removed.is_set():
            return
        self._left = True
        try:
            await self._registry.ask("DELETE", self._path)
        except RouterUnreachable as error:
            _log.warning("the registry at %s was not told that we leave: %s", self._registry.url, error)

    async def stop(self) -> None:
        """Stop the heartbeats, and stay in the list until they are missed."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        retry_s, failing = _RETRY_S, False
        while True:
            self._wake.clear()
            try:
                answer = await self._registry.ask("PUT", self._path, msgspec.json.encode(self._info))
                pause_s = msgspec.json.decode(answer, type=Announced).heartbeat_interval_s
            except Removed:
                _log.warning("somebody took this worker out of the registry at %s", self._registry.url)
                self.removed.set()
                self._settle_first()
                return
            except ConfigError as error:
                self._refuse(error)
                return
            except (RouterUnreachable, msgspec.DecodeError) as error:
                if not failing:
                    _log.warning("the registry at %s is asked again: %s", self._registry.url, error)
                failing = True
                self._settle_first()
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, _RETRY_MAX_S)
                continue
            if failing:
                _log.info("the registry at %s answers again", self._registry.url)
            retry_s, failing = _RETRY_S, False
            self._settle_first()
            await self._pause(pause_s)

    async def _pause(self, pause_s: float) -> None:
        waiting = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait((waiting,), timeout=pause_s)
        finally:
            waiting.cancel()

    def _refuse(self, error: ConfigError) -> None:
        if not self._first.done():
            self._first.set_exception(error)
        else:
            _log.error("%s", error.message)
            self.removed.set()

    def _settle_first(self) -> None:
        if not self._first.done():
            self._first.set_result(None)


def _message(answer: bytes) -> str:
    """The sentence of an error body."""
    try:
        return str(msgspec.json.decode(answer)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")
