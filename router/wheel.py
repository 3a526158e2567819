"""Deadlines by the thousand: one timer for all of them.

A deadline costs two operations on a set; it is kept within a tenth of a second, never early.
"""

import asyncio
import time
from collections.abc import Hashable
from typing import Protocol

_TICK_S = 0.1

Bucket = set["Timed"]


class Timed(Hashable, Protocol):
    def on_time(self) -> None:
        """The deadline has passed; it is forgotten."""


class Wheel:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buckets: dict[int, Bucket] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, item: Timed, due: float) -> Bucket:
        """`due`: monotonic. To forget the deadline, discard the item from the bucket."""
        number = int(due / _TICK_S) + 1
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = set()
            if self._timer is None:
                self._arm()
        bucket.add(item)
        return bucket

    def _arm(self) -> None:
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = int(time.monotonic() / _TICK_S)
        for number in sorted(number for number in self._buckets if number <= now):
            bucket = self._buckets.pop(number)
            while bucket:  # one may forget another
                bucket.pop().on_time()
        if self._buckets:
            self._arm()
