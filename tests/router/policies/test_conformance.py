"""What every policy keeps, with session affinity and without, and with the options that change how it counts."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.config.routing import OPTIONS, policy_options
from diptych.router.policies import load_policy
from diptych.router.policies.request import RouteRequest
from tests.router.policies.fakes import FakeView, views

VARIANTS = [
    (name, {**options, "session_affinity": affinity})
    for name in sorted(OPTIONS)
    for affinity in (True, False)
    for options in ([{}] if name == "round_robin" else [{}, {"use_tokens": True}])
]


@pytest.fixture(params=VARIANTS, ids=str)
def policy(request):
    return make(*request.param)


def make(name, options):
    return load_policy(name, policy_options(name, options, source="test"), random.Random(1))


def run(policy, request, workers):
    """One leg that begins and has not ended."""
    worker = policy.pick(request, workers)
    worker.in_flight += 1
    policy.started(request, worker)
    return worker


def end(policy, request, worker):
    policy.ended(request, worker)
    worker.in_flight -= 1


@given(
    st.sampled_from(VARIANTS),
    st.lists(st.tuples(st.integers(0, 200), st.floats(0, 200)), min_size=1, max_size=6),
    st.integers(0, 5000),
    st.one_of(st.none(), st.text(max_size=5)),
    st.randoms(use_true_random=False),
)
def test_a_pick_is_one_of_the_workers(variant, loads, num_tokens, session, rng):
    policy = make(*variant)
    workers = [FakeView(f"w{number}", *load) for number, load in enumerate(loads)]
    matched = {worker.worker_id: rng.randint(0, num_tokens) for worker in workers if rng.random() < 0.5}
    request = RouteRequest(num_tokens=num_tokens, matched_tokens=matched, session=session)
    running = [(request, run(policy, request, workers)) for _ in range(3)]
    assert all(worker in workers for _, worker in running)
    for leg in running:
        end(policy, *leg)


def test_one_worker_takes_everything(policy):
    (worker,) = views(1, in_flight=500)
    assert policy.pick(RouteRequest(num_tokens=10), [worker]) is worker


def test_legs_that_do_not_end_are_spread(policy):
    workers = views(4)
    for _ in range(80):
        run(policy, RouteRequest(num_tokens=100), workers)
    assert all(15 <= worker.in_flight <= 25 for worker in workers), workers


def test_a_prefix_that_everybody_shares_does_not_fill_one_worker(policy):
    workers = views(4)
    request = RouteRequest(num_tokens=1000, matched_tokens={"w0": 960})
    for _ in range(120):
        run(policy, request, workers)
    # With use_tokens it may have more of them: each has less to compute there.
    assert max(worker.in_flight for worker in workers) <= 64, workers
    assert min(worker.in_flight for worker in workers) >= 8, workers


def test_all_workers_of_an_idle_mesh_get_something(policy):
    workers = views(3)
    seen = Counter()
    for _ in range(300):
        request = RouteRequest(num_tokens=100)
        worker = run(policy, request, workers)
        seen[worker.worker_id] += 1
        end(policy, request, worker)
    assert min(seen.values()) >= 60 and len(seen) == 3, seen


def test_a_worker_that_left_is_not_picked_and_one_that_came_is(policy):
    workers = views(3)
    for _ in range(9):
        run(policy, RouteRequest(num_tokens=10), workers)
    late = FakeView("late")
    changed = [workers[0], late]
    picked = {run(policy, RouteRequest(num_tokens=10), changed).worker_id for _ in range(12)}
    assert picked <= {"w0", "late"} and "late" in picked


def test_unknown_types_and_options_are_named():
    from diptych.errors import ConfigError

    with pytest.raises(
        ConfigError, match="'nearest' does not exist; there is: kv_cache_aware, load_balancing"
    ):
        policy_options("nearest", {}, source="f.yaml")
    with pytest.raises(ConfigError, match='unknown key "load_wieght"; did you mean "load_weight"'):
        policy_options("kv_cache_aware", {"load_wieght": 1}, source="f.yaml")
    with pytest.raises(ConfigError, match="max_batch_size must be a whole number >= 1, not 0"):
        policy_options("kv_cache_aware", {"max_batch_size": 0}, source="f.yaml")
