"""When requests are sent: so many at a time, or so many a second with exponential gaps."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from serving.request import Record

Send = Callable[[int], Awaitable[Record]]  # the request's number to its record


@dataclass(frozen=True)
class Load:
    """`concurrency` alone is a closed loop; `rate` is an open one, which `concurrency` then bounds."""

    concurrency: int | None = None
    rate: float | None = None  # requests a second

    @property
    def label(self) -> str:
        parts = [] if self.rate is None else [f"{self.rate:g} req/s"]
        parts += [] if self.concurrency is None else [f"concurrency {self.concurrency}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Run:
    records: list[Record]
    wall_s: float
    client_cpu_s: float


async def drive(load: Load, send: Send, *, num_requests: int, seed: int) -> Run:
    cpu = time.process_time()
    began = time.perf_counter()
    records = await (
        _closed(load, send, num_requests) if load.rate is None else _open(load, send, num_requests, seed)
    )
    return Run(records, time.perf_counter() - began, time.process_time() - cpu)


async def _closed(load: Load, send: Send, num_requests: int) -> list[Record]:
    numbers = iter(range(num_requests))
    records: list[Record] = []

    async def client() -> None:
        for number in numbers:
            records.append(await send(number))

    await asyncio.gather(*(client() for _ in range(min(load.concurrency or 1, num_requests))))
    return records


async def _open(load: Load, send: Send, num_requests: int, seed: int) -> list[Record]:
    assert load.rate is not None
    draw = random.Random(seed)
    slots = asyncio.Semaphore(load.concurrency or num_requests)

    async def one(number: int) -> Record:
        async with slots:
            return await send(number)

    loop = asyncio.get_running_loop()
    due = loop.time()
    tasks = []
    for number in range(num_requests):
        # Against absolute times: a late wake-up must not lower the rate.
        await asyncio.sleep(max(0.0, due - loop.time()))
        tasks.append(asyncio.create_task(one(number)))
        due += draw.expovariate(load.rate)
    return list(await asyncio.gather(*tasks))
