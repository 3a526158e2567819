"""The prefix index against a plain model, under changes, gaps, restarts and expectations."""

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.block_hash import pack_keys
from diptych.router.prefix_index import PrefixIndex
from diptych.wire import BlockChanges, KvEvents

KEYS = st.integers(0, 9)
WORKERS = st.sampled_from(["a", "b"])
EVENTS = st.one_of(
    st.tuples(st.just("change"), WORKERS, st.sets(KEYS), st.sets(KEYS)),
    st.tuples(st.just("reset"), WORKERS, st.sets(KEYS), st.sampled_from(["e1", "e2"])),
    st.tuples(st.just("gap"), WORKERS, st.sampled_from(["position", "epoch", "lost"])),
    st.tuples(st.just("drop"), WORKERS),
)


def answer(epoch: str, last: int, stored=(), removed=(), *, reset: bool = False) -> KvEvents:
    changes = BlockChanges(stored=pack_keys(stored), removed=pack_keys(removed), reset=reset)
    return KvEvents(epoch=epoch, last=last, changes=changes)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_the_index_equals_a_model(events):
    index = PrefixIndex()
    model: dict[str, tuple[str, int, set[int]]] = {}
    for kind, worker, *rest in events:
        asked = index.position(worker)
        if kind == "reset":
            stored, epoch = rest
            last = model[worker][1] + 3 if worker in model else 1
            assert index.apply(worker, asked, answer(epoch, last, stored, reset=True))
            model[worker] = (epoch, last, set(stored))
        elif kind == "change" and worker in model:
            stored, removed = rest
            epoch, last, held = model[worker]
            held = (held - (removed - stored)) | stored
            assert index.apply(worker, asked, answer(epoch, last + 1, stored, removed - stored))
            model[worker] = (epoch, last + 1, held)
        elif kind == "change":  # of a worker that has told nothing yet: it does not follow on anything
            assert not index.apply(worker, asked, answer("e1", 1, *rest))
        elif kind == "gap" and worker in model:
            epoch, last, _ = model.pop(worker)
            wrong = {
                "position": ((epoch, last - 1), answer(epoch, last + 1, [1])),
                "epoch": (asked, answer("other", last + 1, [1])),
                "lost": (asked, KvEvents(epoch=epoch, last=last + 5)),
            }[rest[0]]
            assert not index.apply(worker, *wrong)
        elif kind == "drop":
            index.drop(worker)
            model.pop(worker, None)
        assert set(index.worker_ids) == set(model)
        for name, (epoch, last, held) in model.items():
            assert index.position(name) == (epoch, last)
            assert index.size(name) == len(held)
            assert {key for key in range(10) if index.match(name, [key], 0.0)} == held


def test_a_match_ends_at_the_first_gap():
    index = PrefixIndex()
    index.apply("a", (None, 0), answer("e", 1, [1, 2, 4], reset=True))
    assert index.match("a", [1, 2, 3, 4], 0.0) == 2
    assert index.match("a", [2], 0.0) == 1
    assert index.match("b", [1], 0.0) == 0


def test_expected_blocks_count_until_their_request_is_over():
    index = PrefixIndex()
    index.expect("a", [1], 0.0)
    assert index.match("a", [1], 0.0) == 0, "nothing is expected of a worker that tells nothing"
    index.apply("a", (None, 0), answer("e", 1, [], reset=True))
    index.expect("a", [1, 2], 0.0)
    assert index.match("a", [1, 2, 3], 60.0) == 2
    index.settle("a", [1, 2], 60.0)
    assert index.match("a", [1, 2], 61.0) == 2
    assert index.match("a", [1, 2], 63.0) == 0
    assert index.size("a") == 0


def test_an_expected_block_that_is_evicted_is_gone():
    index = PrefixIndex()
    index.apply("a", (None, 0), answer("e", 1, [1], reset=True))
    index.expect("a", [1], 0.0)
    index.apply("a", ("e", 1), answer("e", 2, [], [1]))
    assert index.match("a", [1], 0.0) == 0


def test_nothing_is_expected_of_the_process_after_a_restart():
    index = PrefixIndex()
    index.apply("a", (None, 0), answer("e", 1, [], reset=True))
    index.expect("a", [1], 0.0)
    index.apply("a", ("e", 1), answer("e2", 1, [], reset=True))
    assert index.match("a", [1], 0.0) == 0


def test_expectations_do_not_pile_up():
    index = PrefixIndex()
    index.apply("a", (None, 0), answer("e", 1, [], reset=True))
    for round_number in range(20):
        keys = range(round_number * 1000, (round_number + 1) * 1000)
        index.expect("a", keys, 200.0 * round_number)
    held = index._workers["a"].expected
    assert len(held) <= 4096 + 1000
