"""A worker's key in etcd, held by a lease that is kept alive.

    lease ended (etcd restarted empty, we were stopped too long)   new lease, same key, same incarnation
    key gone while our lease lives                                 somebody deleted it: `removed`, not again
    etcd cannot be reached                                         50 ms to 1 s between attempts, for ever

One task does all writing, so writes never overtake each other. Knows nothing of what is announced but its id
and incarnation.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec

from diptych.discovery.etcd_client import NOT_FOUND, EtcdClient, EtcdError, EtcdRefused
from diptych.errors import ConfigError
from diptych.wire import WorkerInfo

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds. etcd itself rounds leases up to 2 s."""

    ttl_s: int = 5
    heartbeat_s: float | None = None  # None: a third of ttl_s, which is also the most
    refresh_interval_s: float = 10.0  # readers list everything again this often
    call_s: float = 3.0
    retry_s: float = 0.05
    retry_max_s: float = 1.0

    @property
    def keep_alive_s(self) -> float:
        third_s = self.ttl_s / 3
        return third_s if self.heartbeat_s is None else min(third_s, self.heartbeat_s)


class EtcdLease:
    def __init__(self, client: EtcdClient, key: str, info: WorkerInfo, timing: Timing) -> None:
        self.removed = asyncio.Event()
        self._client = client
        self._key = key
        self._info = info
        self._written: WorkerInfo | None = None
        self._timing = timing
        # Three attempts fit into the life of a lease.
        self._call_s = min(timing.call_s, timing.keep_alive_s)
        self._lease_id: int | None = None
        self._renew_at = 0.0
        self._wake = asyncio.Event()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name=f"lease-{info.worker_id}")

    async def announced(self) -> None:
        """Wait for the end of the first attempt; ConfigError when the key is another worker's."""
        await asyncio.shield(self._first)

    async def update(self, info: WorkerInfo) -> None:
        if info.worker_id != self._info.worker_id:
            raise ValueError(f"this lease is for {self._info.worker_id!r}, not {info.worker_id!r}")
        self._info = info
        self._wake.set()

    async def close(self) -> None:
        await self.stop()
        if self._lease_id is not None:
            lease_id, self._lease_id = self._lease_id, None
            try:
                await self._client.revoke(lease_id, self._call_s)
            except EtcdError as error:
                _log.warning("%s stays in etcd until its lease ends: %s", self._key, error)

    async def stop(self) -> None:
        """Stop keeping the key alive, and leave it there."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        retry_s = self._timing.retry_s
        failing = False
        while not self.removed.is_set():
            self._wake.clear()
            try:
                await self._step()
            except ConfigError as error:
                self._refuse(error)
                return
            except Exception as error:  # whatever it is, it must not end the registration
                if not failing:
                    known = isinstance(error, EtcdError)
                    _log.warning(
                        "etcd does not take %s, trying again: %s", self._key, error, exc_info=not known
                    )
                failing = True
                self._settle_first()
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, self._timing.retry_max_s)
                continue
            if failing:
                _log.info("%s is in etcd again", self._key)
            failing, retry_s = False, self._timing.retry_s
            self._settle_first()
            await self._pause()

    async def _step(self) -> None:
        """Whatever is due now: announce, replace, keep alive."""
        if self._lease_id is not None and time.monotonic() >= self._renew_at:
            await self._renew(self._lease_id)
        if self._lease_id is None:
            await self._announce()
        elif self._info is not self._written and not self.removed.is_set():
            await self._replace(self._lease_id)

    async def _renew(self, lease_id: int) -> None:
        if not await self._lives(lease_id):
            return
        item = await self._client.get(self._key, self._call_s)
        if item is None:
            # The lease may have ended just before this look: if it lives after it, the key did not go with it.
            if await self._lives(lease_id):
                self._note_removal()
        elif item.lease_id != lease_id:
            self._written = None  # somebody wrote over it, and took it off our lease

    async def _lives(self, lease_id: int) -> bool:
        """And goes on living, if it does."""
        if not await self._client.keep_alive(lease_id, self._call_s):
            _log.warning("the lease of %s has ended: announcing it again", self._key)
            self._lease_id = None
            return False
        self._renew_at = time.monotonic() + self._timing.keep_alive_s
        return True

    async def _announce(self) -> None:
        info, lease_id = self._info, await self._client.grant(self._timing.ttl_s, self._call_s)
        existing = await self._client.create(self._key, _encode(info), lease_id, self._call_s)
        if existing is not None:
            # Ours from before, when the answer to an earlier attempt was lost or its lease has not ended yet.
            if not _is_same(existing.value, info):
                await self._client.revoke(lease_id, self._call_s)
                raise ConfigError(
                    f"The worker id {info.worker_id!r} is registered already by another process."
                )
            if not await self._client.replace(self._key, _encode(info), lease_id, self._call_s):
                return  # it ended in between: once more
        self._lease_id, self._written = lease_id, info
        self._renew_at = time.monotonic() + self._timing.keep_alive_s

    async def _replace(self, lease_id: int) -> None:
        info = self._info
        try:
            exists = await self._client.replace(self._key, _encode(info), lease_id, self._call_s)
        except EtcdRefused as error:
            if error.code != NOT_FOUND:
                raise
            self._lease_id = None
            await self._announce()
            return
        if exists:
            self._written = info
        else:
            self._renew_at = 0.0  # deleted, or gone with its lease: `_renew` finds out

    def _note_removal(self) -> None:
        _log.warning("%s was deleted from etcd by somebody else", self._key)
        self.removed.set()

    def _refuse(self, error: ConfigError) -> None:
        if not self._first.done():
            self._first.set_exception(error)
        else:
            _log.error("%s", error.message)
            self.removed.set()

    def _settle_first(self) -> None:
        if not self._first.done():
            self._first.set_result(None)

    async def _pause(self) -> None:
        due_s = 0.0 if self._lease_id is None else self._renew_at - time.monotonic()
        if due_s > 0 and self._info is self._written:
            waiting = asyncio.ensure_future(self._wake.wait())
            try:
                await asyncio.wait((waiting,), timeout=due_s)
            finally:
                waiting.cancel()


def _encode(info: WorkerInfo) -> bytes:
    return msgspec.json.encode(info)


def _is_same(value: bytes, info: WorkerInfo) -> bool:
    try:
        return msgspec.json.decode(value, type=WorkerInfo).incarnation == info.incarnation
    except msgspec.DecodeError:
        return False
