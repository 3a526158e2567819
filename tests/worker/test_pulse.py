"""An engine that answers is asked again; one that does not has hung."""

import asyncio

import pytest

from diptych.worker import pulse
from diptych.worker.engine_client import EngineClient
from diptych.worker.pulse import Pulse


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_one_question_at_a_time():
    clock, asked = Clock(), []
    heart = Pulse(lambda: asked.append(clock.now), clock)
    heart.beat()
    clock.now += 7
    heart.beat()
    assert asked == [50.0]
    assert heart.silent_s == 7.0
    heart.answered()
    assert heart.silent_s == 0.0
    heart.beat()
    assert asked == [50.0, 57.0]


async def test_the_one_that_answers_is_never_given_up(monkeypatch):
    monkeypatch.setattr(pulse, "_INTERVAL_S", 0.0)
    clock, turns = Clock(), []

    def ask():
        turns.append(clock.now)
        clock.now += 4
        if len(turns) < 5:
            heart.answered()

    heart = Pulse(ask, clock)
    running = asyncio.create_task(heart.run(10.0))
    while len(turns) < 5:
        await asyncio.sleep(0)
    assert not running.done()
    clock.now += 6.5
    assert await asyncio.wait_for(running, 5) == 10.5


class FakeProcess:
    def __init__(self, returncode: int | None) -> None:
        self.returncode = returncode
        self.kills = 0

    def kill(self) -> None:
        self.kills += 1


@pytest.mark.parametrize(("returncode", "kills"), [(None, 1), (3, 0)])
async def test_an_engine_that_hangs_is_killed(returncode, kills):
    client = EngineClient(None, hang_timeout_s=0.01)
    process = FakeProcess(returncode)
    await asyncio.wait_for(client._kill_when_it_hangs(process), 5)
    assert process.kills == kills
    await client.close()
