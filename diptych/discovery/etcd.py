"""The registry in etcd: one key a worker, `/trtllm/<cluster>/workers/<worker_id>`, whose value is WorkerInfo.

Readers list everything at revision R, follow changes from R+1, and list again every `refresh_interval_s` and
after anything odd: a broken stream, a compacted revision, a new token. So no state outlives a mistake, and
half-open connections heal. While etcd cannot be read nothing is yielded, which keeps every reader's last
snapshot in force. An etcd that lost its memory (its revision went back) is given one lease time for workers
to announce themselves again before those it does not list are gone.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from diptych.discovery import Snapshot
from diptych.discovery.etcd_client import Change, EtcdAddress, EtcdClient, EtcdError
from diptych.discovery.etcd_lease import EtcdLease, Timing
from diptych.wire import WorkerInfo

_DEFAULT_CLUSTER = "default"
_log = logging.getLogger(__name__)


class EtcdRegistry:
    def __init__(self, address: EtcdAddress, *, cluster: str = "", timing: Timing | None = None) -> None:
        self._address = address
        self._client = EtcdClient(address)
        self._prefix = f"/trtllm/{cluster or _DEFAULT_CLUSTER}/workers/"
        self._timing = timing or Timing()
        self._leases: set[EtcdLease] = set()
        self._closed = asyncio.Event()

    async def register(self, info: WorkerInfo) -> EtcdLease:
        """Returns after the first attempt. One that failed is repeated in the background, for ever."""
        lease = EtcdLease(self._client, self._prefix + quote(info.worker_id, safe=":"), info, self._timing)
        self._leases.add(lease)
        await lease.announced()
        return lease

    async def watch(self) -> AsyncIterator[Snapshot]:
        view = _View(self._prefix, self._timing.ttl_s, time.monotonic)
        shown: Snapshot | None = None
        pause_s, failing = self._timing.retry_s, False
        while not self._closed.is_set():
            started = time.monotonic()
            try:
                async for snapshot in self._one_round(view):
                    if failing:
                        failing = False
                        _log.info("etcd at %s answers again: %d workers", self._address, len(snapshot))
                    if snapshot != shown:
                        shown = snapshot
                        yield snapshot
            except Exception as error:  # whatever it is, it must not end the watch
                if not failing:
                    _log.warning(
                        "etcd at %s cannot be read; the last snapshot stays: %s",
                        self._address,
                        error,
                        exc_info=not isinstance(error, EtcdError),
                    )
                failing = True
            lived_s = time.monotonic() - started
            await _first_of(self._closed.wait(), timeout_s=pause_s)
            pause_s = min(pause_s * 2, self._timing.retry_max_s) if lived_s < 1.0 else self._timing.retry_s

    async def close(self) -> None:
        """Keys that are still registered stay until their lease ends; Lease.close removes one at once."""
        self._closed.set()
        await asyncio.gather(*(lease.stop() for lease in self._leases))
        await self._client.close()

    async def _one_round(self, view: "_View") -> AsyncIterator[Snapshot]:
        """One listing and what changes after it, until it is time to list again."""
        listing = await self._client.read_prefix(self._prefix, self._timing.call_s)
        view.list_again({key: item.value for key, item in listing.items.items()}, listing.revision)
        yield view.snapshot()
        end = time.monotonic() + self._timing.refresh_interval_s
        stream = self._client.watch(self._prefix, listing.revision + 1, self._timing.call_s)
        async with aclosing(stream):
            while True:
                due_s = min(end, view.grace_ends or end) - time.monotonic()
                try:
                    changes = await _first_of(anext(stream, None), self._closed.wait(), timeout_s=due_s)
                except EtcdError as error:
                    _log.info("etcd at %s: %s; listing again", self._address, error)
                    return
                if not isinstance(changes, list):  # time to list again, or closed
                    return
                view.apply(changes)
                yield view.snapshot()


async def _first_of(*works: Awaitable[Any], timeout_s: float) -> Any:
    """The result of the work that ends first, None when none does in time; the others are cancelled."""
    tasks = [asyncio.ensure_future(_awaited(work)) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return next((task.result() for task in tasks if task in done), None)


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


class _View:
    """What a reader believes: pure, with its clock as a parameter."""

    def __init__(self, prefix: str, grace_s: float, clock: Callable[[], float]) -> None:
        self._prefix = prefix
        self._grace_s = grace_s
        self._clock = clock
        self._revision = 0
        self._values: dict[str, bytes] = {}
        self._remembered: dict[str, bytes] = {}  # from before etcd lost its memory
        self._decoded: dict[str, tuple[bytes, WorkerInfo | None]] = {}  # each value is read once
        self.grace_ends: float | None = None

    def list_again(self, values: dict[str, bytes], revision: int) -> None:
        now = self._clock()
        if revision < self._revision and self._values:
            _log.warning(
                "etcd lost its memory (revision %d after %d): %d workers are kept for %g s",
                revision,
                self._revision,
                len(self._values),
                self._grace_s,
            )
            self._remembered = {**self._remembered, **self._values}
            self.grace_ends = now + self._grace_s
        elif self.grace_ends is not None and now >= self.grace_ends:
            self._remembered, self.grace_ends = {}, None
        self._revision = revision
        self._values = values
        self._forget(values)
        for key in self._decoded.keys() - values.keys() - self._remembered.keys():
            del self._decoded[key]

    def apply(self, changes: list[Change]) -> None:
        for change in changes:
            if change.value is None:
                self._values.pop(change.key, None)
            else:
                self._values[change.key] = change.value
            self._revision = change.revision
        self._forget({change.key: b"" for change in changes})

    def snapshot(self) -> Snapshot:
        values = {**self._remembered, **self._values}
        found = (self._decode(key, values[key]) for key in sorted(values))
        return tuple(info for info in found if info is not None)

    def _forget(self, seen: dict[str, bytes]) -> None:
        for key in seen:
            self._remembered.pop(key, None)

    def _decode(self, key: str, value: bytes) -> WorkerInfo | None:
        known = self._decoded.get(key)
        if known is None or known[0] != value:
            known = self._decoded[key] = value, self._read(key, value)
        return known[1]

    def _read(self, key: str, value: bytes) -> WorkerInfo | None:
        try:
            info = msgspec.json.decode(value, type=WorkerInfo)
            if info.worker_id != unquote(key.removeprefix(self._prefix)):
                raise msgspec.ValidationError(f"its worker_id is {info.worker_id!r}")
        except msgspec.DecodeError as error:
            _log.warning("%s is not a worker and is ignored: %s", key, error)
            return None
        return info
