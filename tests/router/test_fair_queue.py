"""The waiting line: fair between keys, in order within one, bounded."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from diptych.router.fair_queue import FairQueue

KEYS = {"a": 1.0, "b": 1.0, "c": 3.0}


def filled(counts: dict[str, int], capacity: int = 10_000) -> FairQueue[tuple[str, int]]:
    queue: FairQueue[tuple[str, int]] = FairQueue(capacity)
    for key, count in counts.items():
        for number in range(count):
            queue.push(key, KEYS[key], (key, number))
    return queue


def test_a_greedy_key_does_not_starve_another():
    queue = filled({"a": 1000, "b": 3})
    served = [queue.pop()[0] for _ in range(6)]
    assert Counter(served) == {"a": 3, "b": 3}


def test_weights():
    queue = filled({"a": 100, "c": 300})
    served = Counter(queue.pop()[0] for _ in range(80))
    assert abs(served["c"] - 60) <= 1


def test_who_was_idle_gets_no_credit_for_it():
    queue = filled({"a": 100})
    for _ in range(50):
        queue.pop()
    for number in range(50):
        queue.push("b", 1.0, ("b", number))
    served = Counter(queue.pop()[0] for _ in range(20))
    assert abs(served["b"] - 10) <= 1


def test_a_full_line_drops_the_last_of_the_longest():
    queue = filled({"a": 9, "b": 1}, capacity=10)
    assert queue.push("b", 1.0, ("b", 1)) == ("a", 8)
    assert queue.push("a", 1.0, ("a", 99)) == ("a", 99)  # its own key has the most already
    assert len(queue) == 10


def test_without_room_nobody_waits():
    queue: FairQueue[str] = FairQueue(0)
    assert queue.push("a", 1.0, "x") == "x"
    assert len(queue) == 0


@given(
    st.integers(1, 12),
    st.lists(st.one_of(st.sampled_from(sorted(KEYS)), st.just("pop"), st.just("remove"))),
)
def test_against_a_list(capacity, actions):
    """Whatever happens: nothing is lost or served twice, keys keep their order, the prediction holds."""
    queue: FairQueue[tuple[str, int]] = FairQueue(capacity)
    waiting: list[tuple[str, int]] = []
    for number, action in enumerate(actions):
        if action == "pop" and waiting:
            entry = queue.pop()
            assert entry == next(other for other in waiting if other[0] == entry[0])
            waiting.remove(entry)
        elif action == "remove" and waiting:
            entry = waiting.pop(number % len(waiting))
            queue.remove(entry[0], entry)
        elif action in KEYS:
            entry = (action, number)
            dropped = queue.push(action, KEYS[action], entry)
            if dropped is not entry:
                waiting.append(entry)
            if dropped is not None and dropped is not entry:
                waiting.remove(dropped)
        assert len(queue) == len(waiting) <= capacity
    assert sorted(queue.pop() for _ in range(len(queue))) == sorted(waiting)


@given(st.dictionaries(st.sampled_from(sorted(KEYS)), st.integers(0, 20)), st.sampled_from(sorted(KEYS)))
def test_the_predicted_place_is_the_place(counts, key):
    queue = filled(counts)
    ahead = queue.ahead_of(key, KEYS[key])
    queue.push(key, KEYS[key], (key, -1))
    place = next(place for place in range(len(queue)) if queue.pop() == (key, -1))
    assert abs(place - ahead) <= len(KEYS)  # equal tags may go either way
