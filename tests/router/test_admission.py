"""Who runs, who waits, who is refused: with a clock of the test's own."""

import asyncio

import pytest

from diptych.errors import Overloaded
from diptych.router.admission import Admission
from diptych.router.api_keys import ApiKey

ANYBODY = ApiKey("")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


async def waiters(admission: Admission, count: int) -> None:
    while admission.waiting < count:
        await asyncio.sleep(0)


async def test_up_to_the_limit_nobody_waits(clock):
    admission = Admission(lambda: 3, 10, clock=clock)
    for _ in range(3):
        await admission.enter(ANYBODY, clock.now + 10)
    assert (admission.running, admission.waiting) == (3, 0)


async def test_the_next_comes_in_when_one_leaves_in_order_of_arrival(clock):
    admission = Admission(lambda: 1, 10, clock=clock)
    await admission.enter(ANYBODY, clock.now + 10)
    order = []

    async def run(number):
        await admission.enter(ANYBODY, clock.now + 10)
        order.append(number)
        admission.leave(0.0, is_whole=False)

    tasks = []
    for number in range(4):
        tasks.append(asyncio.create_task(run(number)))
        await waiters(admission, number + 1)
    admission.leave(0.0, is_whole=False)
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3]
    assert (admission.running, admission.waiting) == (0, 0)


async def test_refused_at_once_when_the_wait_does_not_fit_the_deadline(clock):
    admission = Admission(lambda: 2, 100, clock=clock)
    for _ in range(2):
        await admission.enter(ANYBODY, clock.now + 100)
        admission.leave(4.0, is_whole=True)
        await admission.enter(ANYBODY, clock.now + 100)
    waiting = [asyncio.create_task(admission.enter(ANYBODY, clock.now + 100)) for _ in range(4)]
    await waiters(admission, 4)
    # Fifth in line, a place every 2 s, then 4 s to run: 14 s.
    with pytest.raises(Overloaded) as refusal:
        await admission.enter(ANYBODY, clock.now + 13.9)
    assert refusal.value.status == 429
    assert refusal.value.headers() == {"Retry-After": "10"}
    assert admission.refused == 1
    fits = asyncio.create_task(admission.enter(ANYBODY, clock.now + 14.1))
    await waiters(admission, 5)
    for task in (*waiting, fits):
        task.cancel()
    await asyncio.gather(*waiting, fits, return_exceptions=True)
    assert admission.waiting == 0


async def test_refused_in_its_turn_when_it_could_not_end_in_time(clock):
    admission = Admission(lambda: 1, 10, clock=clock)
    for _ in range(2):
        await admission.enter(ANYBODY, clock.now + 100)
        admission.leave(4.0, is_whole=True)
    await admission.enter(ANYBODY, clock.now + 100)
    late, next_one = (asyncio.create_task(admission.enter(ANYBODY, clock.now + left)) for left in (10, 30))
    await waiters(admission, 2)
    clock.now += 7  # longer than foretold
    admission.leave(7.0, is_whole=True)
    with pytest.raises(Overloaded, match=r"the deadline is in 3\.0 s"):
        await late
    await next_one
    assert (admission.running, admission.refused) == (1, 1)


async def test_what_was_broken_off_counts_when_it_took_long(clock):
    """Or those that end in time would make the rest look fast."""
    admission = Admission(lambda: 1, 10, clock=clock)
    for took_s, is_whole in ((4.0, True), (1.0, False), (9.0, False)):
        await admission.enter(ANYBODY, clock.now + 100)
        admission.leave(took_s, is_whole=is_whole)
    await admission.enter(ANYBODY, clock.now + 100)
    with pytest.raises(Overloaded, match=r"The wait would be 9\.0 s"):
        await admission.enter(ANYBODY, clock.now + 10)


async def test_a_full_line_refuses(clock):
    admission = Admission(lambda: 1, 1, clock=clock)
    await admission.enter(ANYBODY, clock.now + 10)
    waiting = asyncio.create_task(admission.enter(ANYBODY, clock.now + 10))
    await waiters(admission, 1)
    with pytest.raises(Overloaded, match="1 requests wait already"):
        await admission.enter(ANYBODY, clock.now + 10)
    admission.leave(0.0, is_whole=False)
    await waiting
    assert (admission.running, admission.waiting) == (1, 0)


async def test_a_full_line_makes_room_for_the_key_that_has_less_of_it(clock):
    admission = Admission(lambda: 1, 2, clock=clock)
    greedy, modest = ApiKey("greedy"), ApiKey("modest")
    await admission.enter(greedy, clock.now + 10)
    first, last = (asyncio.create_task(admission.enter(greedy, clock.now + 10)) for _ in range(2))
    await waiters(admission, 2)
    welcome = asyncio.create_task(admission.enter(modest, clock.now + 10))
    with pytest.raises(Overloaded, match="this key has the most of it"):
        await last
    admission.leave(0.0, is_whole=False)
    admission.leave(0.0, is_whole=False)
    await asyncio.gather(first, welcome)


async def test_a_deadline_that_passes_in_line_is_a_refusal():
    admission = Admission(lambda: 1, 10)
    now = asyncio.get_running_loop().time()
    await admission.enter(ANYBODY, now + 10)
    with pytest.raises(Overloaded, match="deadline passed"):
        await admission.enter(ANYBODY, now + 0.05)
    assert (admission.running, admission.waiting) == (1, 0)


async def test_a_client_that_leaves_in_the_moment_of_its_turn_gives_the_place_on(clock):
    admission = Admission(lambda: 1, 10, clock=clock)
    await admission.enter(ANYBODY, clock.now + 10)
    leaver, next_one = (asyncio.create_task(admission.enter(ANYBODY, clock.now + 10)) for _ in range(2))
    await waiters(admission, 2)
    admission.leave(0.0, is_whole=False)
    leaver.cancel()  # its turn is set already, and it has not run since
    await asyncio.wait_for(next_one, 5)
    assert leaver.cancelled()
    assert (admission.running, admission.waiting) == (1, 0)


async def test_a_risen_limit_is_used_when_the_next_one_leaves(clock):
    limit = 1
    admission = Admission(lambda: limit, 10, clock=clock)
    await admission.enter(ANYBODY, clock.now + 10)
    waiting = [asyncio.create_task(admission.enter(ANYBODY, clock.now + 10)) for _ in range(3)]
    await waiters(admission, 3)
    limit = 3
    admission.leave(0.0, is_whole=False)
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert admission.running == 3
