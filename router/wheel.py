"""Deadlines by the thousand: one timer for all of them, which rests until the first of them is due.

A deadline costs two operations on a set; it is kept within a tenth of a second, never early.
"""

import asyncio
import time
from collections.abc import Hashable
from typing import Protocol

_TICK_S = 0.1
_MARGIN_S = 0.001  # timers have whole milliseconds: one that rings early finds nothing due

Bucket = set["Timed"]


class Timed(Hashable, Protocol):
    def on_time(self) -> None:
        """The deadline has passed; it is forgotten."""


class Wheel:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buckets: dict[int, Bucket] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0  # the bucket that the timer is for

    def add(self, item: Timed, due: float) -> Bucket:
        """`due`: monotonic. To forget the deadline, discard the item from the bucket."""
        number = int(due / _TICK_S) + 1
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = set()
            if self._timer is None or number < self._next:
                self._arm(number)
        bucket.add(item)
        return bucket

    def _arm(self, number: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = number
        left_s = number * _TICK_S - time.monotonic()
        self._timer = self._loop.call_later(max(0.0, left_s) + _MARGIN_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = int(time.monotonic() / _TICK_S)
        for number in sorted(self._buckets):
            bucket = self._buckets[number]
            if number <= now:
                del self._buckets[number]
                while bucket:  # one may forget another
                    bucket.pop().on_time()
            elif not bucket:  # all of it was forgotten
                del self._buckets[number]
        if self._buckets:
            self._arm(min(self._buckets))
