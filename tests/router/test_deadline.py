"""Waiting with a time limit: results, time-outs, and cancellations that are never lost."""

import asyncio

import pytest

from diptych.router.deadline import within


async def test_result_and_error_come_through():
    async def fail() -> None:
        raise ValueError("x")

    assert await within(5.0, asyncio.sleep(0, "result")) == "result"
    with pytest.raises(ValueError, match="x"):
        await within(5.0, fail())


async def test_time_out_cancels_the_work():
    work = asyncio.Event().wait()
    with pytest.raises(asyncio.TimeoutError):
        await within(0.01, work)


async def test_cancellation_that_comes_with_the_result_is_not_lost():
    done = asyncio.Event()
    task = asyncio.create_task(within(5.0, done.wait()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    done.set()
    await asyncio.sleep(0)  # the work has its result, the waiter has not run yet
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
