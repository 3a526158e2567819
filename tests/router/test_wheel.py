"""Deadlines on one timer: never early, a tenth late at most, forgotten when discarded."""

import asyncio
import time
from collections.abc import Callable

from diptych.router.wheel import Wheel


class Item:
    def __init__(self, then=None):
        self.rang: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.then = then

    def on_time(self) -> None:
        self.rang.set_result(time.monotonic())
        if self.then is not None:
            self.then()


async def test_each_rings_in_its_time():
    wheel = Wheel(asyncio.get_running_loop())
    start = time.monotonic()
    items = [(Item(), start + delay_s) for delay_s in (0.25, 0.0, 0.12, -1.0)]
    for item, due in items:
        wheel.add(item, due)
    rang = await asyncio.wait_for(asyncio.gather(*(item.rang for item, _ in items)), 5)
    assert all(when >= due for when, (_, due) in zip(rang, items, strict=True))
    assert rang[2] < rang[0]


async def test_what_is_discarded_does_not_ring_even_by_a_neighbour():
    wheel = Wheel(asyncio.get_running_loop())
    due = time.monotonic()
    silent, last = Item(), Item()
    bucket = wheel.add(silent, due)
    bucket.discard(silent)
    twins = [Item(), Item()]
    for item, other in zip(twins, reversed(twins), strict=True):
        item.then = lambda other=other: wheel.add(other, due).discard(other) or bucket.discard(other)
        wheel.add(item, due)
    wheel.add(last, due + 0.1)
    await asyncio.wait_for(last.rang, 5)
    assert not silent.rang.done()
    assert sum(item.rang.done() for item in twins) == 1


class Timers:
    """A loop whose timers ring by hand."""

    def __init__(self) -> None:
        self.running: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay_s, callback):
        self.running.append((delay_s, callback))
        return self

    def cancel(self) -> None:
        self.running.clear()

    def ring(self) -> None:
        ((_, callback),) = self.running
        self.running.clear()
        callback()


def test_it_rests_until_the_first_deadline():
    timers, now = Timers(), time.monotonic()
    wheel = Wheel(timers)
    late, soon = object(), object()
    wheel.add(late, now + 60)
    wheel.add(late, now + 70)
    assert [round(delay_s) for delay_s, _ in timers.running] == [60]
    bucket = wheel.add(soon, now + 10)
    assert [round(delay_s) for delay_s, _ in timers.running] == [10]
    bucket.discard(soon)
    timers.ring()  # for nothing: what it was for is forgotten
    assert [round(delay_s) for delay_s, _ in timers.running] == [60]
