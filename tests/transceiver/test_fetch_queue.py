"""How much of what is asked for runs at once."""

import threading

import pytest

from diptych.transceiver.fetch_queue import FetchQueue

PATIENCE_S = 15.0


class Work:
    """Begins when the queue lets it, ends when the test does."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.may_end.wait(PATIENCE_S)


@pytest.fixture
def run():
    """Start so many works of given lengths in a new queue."""
    opened: list[tuple[FetchQueue, list[Work]]] = []

    def run(threads: int, limit: int | None, *lengths: int):
        queue, works = FetchQueue(threads, limit), [Work() for _ in lengths]
        opened.append((queue, works))
        return queue, works, [queue.submit(length, work) for length, work in zip(lengths, works, strict=True)]

    yield run
    for queue, works in opened:
        for work in works:
            work.may_end.set()
        queue.close()


def begun(works) -> list[bool]:
    return [work.begun.is_set() for work in works]


def test_tokens_are_bounded_and_the_order_is_kept(run):
    queue, works, futures = run(8, 100, 60, 40, 1, 1)
    assert works[0].begun.wait(PATIENCE_S)
    assert works[1].begun.wait(PATIENCE_S)
    assert queue.num_waiting == 2
    works[1].may_end.set()
    assert works[2].begun.wait(PATIENCE_S)
    assert works[3].begun.wait(PATIENCE_S)
    futures[1].result(PATIENCE_S)


def test_what_is_longer_than_the_limit_runs_alone(run):
    queue, works, _ = run(8, 100, 500, 1)
    assert works[0].begun.wait(PATIENCE_S)
    assert queue.num_waiting == 1
    works[0].may_end.set()
    assert works[1].begun.wait(PATIENCE_S)


def test_a_later_short_one_does_not_overtake(run):
    queue, works, _ = run(8, 100, 60, 500, 1)
    assert works[0].begun.wait(PATIENCE_S)
    assert queue.num_waiting == 2
    works[0].may_end.set()
    assert works[1].begun.wait(PATIENCE_S)
    assert begun(works) == [True, True, False]


def test_the_number_is_bounded_without_a_limit_of_tokens(run):
    queue, works, _ = run(2, None, 10, 10, 10)
    assert works[1].begun.wait(PATIENCE_S)
    assert queue.num_waiting == 1


def test_what_waits_can_be_cancelled_and_what_runs_cannot(run):
    _, works, futures = run(8, 10, 10, 10, 10)
    assert works[0].begun.wait(PATIENCE_S)
    assert not futures[0].cancel()
    assert futures[1].cancel()
    works[0].may_end.set()
    assert works[2].begun.wait(PATIENCE_S)
    assert not works[1].begun.is_set()
