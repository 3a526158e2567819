"""How soon the router knows: of a worker that is READY, and of one that is killed. DIPTYCH_WATCH_ROUNDS (6).

Writes the times to benchmarks/results/faults_watch_latency.json. Looking costs a few milliseconds itself.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import pytest
from fault_clients import body_of, session
from fault_mesh import KEYS

ROUNDS = int(os.environ.get("DIPTYCH_WATCH_ROUNDS", "6"))
LOOK_S = 0.002
PATIENCE_S = 90.0


class Traffic:
    """One client that asks all the time. Use as ``async with``."""

    def __init__(self, faults) -> None:
        self._url = faults.router.url
        self._asked_at: list[tuple[str, float]] = []  # context worker, when its request was sent
        self._answered = asyncio.Event()

    async def __aenter__(self) -> "Traffic":
        self._task = asyncio.create_task(self._ask())
        await self._answered.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _ask(self) -> None:
        async with session() as client:
            while True:
                path, body = body_of("greedy", 2)
                body.update(stream=False, stream_options=None)
                asked_at = time.monotonic()
                async with client.post(self._url + path, json=body) as response:
                    assert response.status == 200, await response.text()
                    self._asked_at.append((response.headers["X-Diptych-Context-Worker"], asked_at))
                self._answered.set()

    async def first_request_to(self, worker_id: str) -> float:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for name, asked_at in self._asked_at:
                if name == worker_id:
                    return asked_at
            self._answered.clear()
            await asyncio.wait_for(self._answered.wait(), PATIENCE_S)
        raise AssertionError(f"{worker_id} got no request within {PATIENCE_S:g} s")


async def when(what: str, condition: Callable[[], object]) -> float:
    """The moment in which the condition is found to hold."""

    def look() -> float:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if condition():
                return time.monotonic()
            time.sleep(LOOK_S)
        raise AssertionError(f"not within {PATIENCE_S:g} s: {what}")

    return await asyncio.to_thread(look)


def states_in_etcd(faults, worker) -> dict[str, str]:
    """By worker id: one that was killed stays for a while beside the one that took its place."""
    keys = faults.etcd.keys(KEYS).items()
    return {
        key.removeprefix(KEYS): info.get("state", "READY") for key, info in keys if info["url"] == worker.url
    }


def new_and_ready(faults, worker, before: set[str]) -> list[str]:
    states = states_in_etcd(faults, worker).items()
    return [name for name, state in states if state == "READY" and name not in before]


def summary(seconds: list[float]) -> dict[str, object]:
    return {
        "median_s": round(statistics.median(seconds), 3),
        "max_s": round(max(seconds), 3),
        "all_s": [round(value, 3) for value in seconds],
    }


@pytest.mark.slow
@pytest.mark.timeout(60 + ROUNDS * 120)
async def test_how_soon_the_router_knows(faults, record):
    victim = faults.contexts[1]
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    def is_down() -> bool:
        return faults.state(victim) == "DOWN"

    for _ in range(ROUNDS):
        async with Traffic(faults) as traffic:
            killed_at = time.monotonic()
            victim.kill()
            note("kill_under_traffic_to_down", await when("DOWN", is_down) - killed_at)
            ready = partial(new_and_ready, faults, victim, set(states_in_etcd(faults, victim)))
            victim.start()
            announced_at, known_at = await asyncio.gather(
                when("READY in etcd", ready),
                when("READY in the router", lambda: faults.state(victim) == "READY"),
            )
            (worker_id,) = ready()
            note("ready_to_known", known_at - announced_at)
            note("ready_to_first_request", await traffic.first_request_to(worker_id) - announced_at)
        killed_at = time.monotonic()
        victim.kill()
        down_at, gone_at = await asyncio.gather(
            when("DOWN", is_down), when("no key", lambda: not states_in_etcd(faults, victim))
        )
        note("kill_without_traffic_to_down", down_at - killed_at)
        note("kill_to_key_gone", gone_at - killed_at)
        victim.start()
        await when("READY again", lambda: faults.state(victim) == "READY")
    record("watch_latency", rounds=ROUNDS, **{name: summary(seconds) for name, seconds in times.items()})
