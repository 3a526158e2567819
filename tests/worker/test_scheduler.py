import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import VOCAB, Simulation, random_prompt, reference

from diptych.worker import scheduler


def test_one_sequence_gives_the_models_tokens():
    simulation = Simulation()
    simulation.add("a", [1, 2, 3], max_tokens=6)
    simulation.run()
    assert simulation.tokens("a") == reference([1, 2, 3], 6)
    assert simulation.reason("a") == "length"
    assert simulation.scheduler.pool.counts().active == 0


def test_a_long_prompt_is_computed_in_chunks_beside_running_sequences():
    simulation = Simulation(max_num_tokens=4)
    simulation.add("short", [1], max_tokens=8)
    simulation.step()
    simulation.add("long", list(range(14)), max_tokens=2)
    produced = []
    for _ in range(4):
        simulation.step()
        produced.append(len(simulation.tokens("short")))
    assert produced == [2, 3, 4, 5], "the running sequence draws a token in every step"
    simulation.run()
    assert simulation.tokens("long") == reference(list(range(14)), 2)


def test_a_prefix_hit_skips_the_cached_blocks():
    simulation = Simulation()
    prompt = list(range(10))
    simulation.add("a", prompt)
    simulation.run()
    simulation.add("b", prompt)
    simulation.run()
    assert simulation.events["a"][0].num_cached_tokens == 0
    assert simulation.events["b"][0].num_cached_tokens == 8
    assert simulation.tokens("a") == simulation.tokens("b")


def test_equal_prompts_at_once_are_computed_once():
    simulation = Simulation(num_blocks=40, max_num_tokens=64)
    for index in range(4):
        simulation.add(f"r{index}", list(range(12)), max_tokens=3)
    simulation.run()
    cached = [simulation.events[f"r{index}"][0].num_cached_tokens for index in range(4)]
    assert cached == [0, 8, 8, 8]


def test_no_evict_waits_instead_of_preempting():
    simulation = Simulation(num_blocks=6, max_seq_len=24)
    for index in range(5):
        simulation.add(f"r{index}", [index] * 6, max_tokens=8)
    simulation.run()
    assert simulation.scheduler.num_preemptions == 0
    for index in range(5):
        assert simulation.tokens(f"r{index}") == reference([index] * 6, 8)


def test_max_utilization_preempts_and_still_gives_the_same_tokens():
    simulation = Simulation(num_blocks=6, max_seq_len=24, policy="MAX_UTILIZATION")
    for index in range(5):
        simulation.add(f"r{index}", [index] * 6, max_tokens=12)
    simulation.run()
    assert simulation.scheduler.num_preemptions > 0
    for index in range(5):
        assert simulation.tokens(f"r{index}") == reference([index] * 6, 12)


def test_a_context_leg_leases_its_blocks():
    simulation = Simulation()
    simulation.add("a", list(range(9)), request_type="context_only")
    simulation.run()
    assert simulation.tokens("a") == reference(list(range(9)), 1)
    assert simulation.reason("a") is None
    assert simulation.scheduler.pool.counts().leased == 3
    simulation.scheduler.unlease(simulation.leases[0])
    assert simulation.scheduler.pool.counts().leased == 0
    simulation.scheduler.check()


def test_a_context_leg_that_ends_with_its_first_token_leases_nothing():
    simulation = Simulation()
    simulation.add("a", [1, 2], max_tokens=1, request_type="context_only")
    simulation.run()
    assert simulation.reason("a") == "length" and not simulation.leases


@pytest.mark.parametrize("arrives", [True, False])
def test_a_generation_leg_fetches_or_recomputes(arrives):
    simulation = Simulation()
    prompt = list(range(9))
    want = reference(prompt, 6)
    simulation.add(
        "a", prompt, max_tokens=6, request_type="generation_only", output_token_ids=want[:1], ticket=b"t"
    )
    simulation.step()
    (fetch,) = simulation.fetches
    assert list(fetch.source_indices) == [0, 1, 2]
    assert simulation.step() == 0, "nothing to compute while the KV is on its way"
    (simulation.land if arrives else simulation.fail)(fetch)
    simulation.run()
    assert simulation.tokens("a") == want[1:]


def test_a_cached_prefix_is_not_fetched_again():
    simulation = Simulation()
    prompt = list(range(9))
    simulation.add("warm", prompt)
    simulation.run()
    simulation.add("a", prompt, request_type="generation_only", output_token_ids=[3], ticket=b"t")
    simulation.step()
    assert list(simulation.fetches[0].source_indices) == [2]


def test_blocks_of_an_aborted_fetch_are_held_until_the_copy_ends():
    simulation = Simulation()
    simulation.add("a", list(range(9)), request_type="generation_only", output_token_ids=[3], ticket=b"t")
    simulation.step()
    simulation.scheduler.abort("a")
    simulation.step()
    assert simulation.reason("a") == "cancelled"
    assert simulation.scheduler.pool.counts().active == 3
    simulation.fail(simulation.fetches[0])
    assert simulation.scheduler.pool.counts().active == 0
    simulation.scheduler.check()


def test_blocks_in_which_a_copy_lingers_are_nobodys():
    simulation = Simulation()
    prompt = list(range(9))
    simulation.add("a", prompt, request_type="generation_only", output_token_ids=[3], ticket=b"t")
    simulation.add("b", [7] * 9, request_type="generation_only", output_token_ids=[3], ticket=b"t")
    simulation.step()
    first, second = simulation.fetches
    simulation.scheduler.abort("b")
    for fetch in (first, second):
        simulation.fail(fetch, fetch.destination_blocks)
    assert simulation.scheduler.pool.counts().leased == 6
    simulation.run()
    assert simulation.tokens("a") == reference([*prompt, 3], 4), "computed, in other blocks"
    assert simulation.reason("b") == "cancelled" and simulation.scheduler.num_preemptions == 0
    generations = simulation.scheduler.pool.generations
    assert [generations[block] for block in (*first.destination_blocks, *second.destination_blocks)] == [
        1
    ] * 6
    assert simulation.scheduler.pool.counts().leased == 6
    for fetch in (first, second):
        simulation.scheduler.unlease(fetch.destination_blocks)
    assert simulation.scheduler.pool.counts().leased == 0
    simulation.scheduler.check()


def test_deadlines_end_sequences_with_a_typed_error():
    simulation = Simulation(max_batch_size=1)
    simulation.add("a", [1, 2], max_tokens=30)
    simulation.add("b", [1, 2], max_tokens=30, timeout_s=3.0)
    simulation.run()
    assert simulation.reason("b") == "timeout"
    assert simulation.events["b"][-1].error_status == 504
    assert len(simulation.tokens("a")) == 30


@pytest.mark.parametrize(
    ("prompt", "fields", "status", "word"),
    [
        ([], {}, 400, "empty"),
        (list(range(45)), {}, 400, "at most 39"),
        ([1], {"request_type": "generation_only"}, 400, "first_gen_tokens"),
    ],
)
def test_what_can_never_run_ends_at_once(prompt, fields, status, word):
    simulation = Simulation()
    simulation.add("a", prompt, **fields)
    simulation.run()
    (event,) = simulation.events["a"]
    assert event.finish_reason == "error" and event.error_status == status
    assert word in (event.error or "")


def test_output_stops_at_max_seq_len():
    simulation = Simulation(max_seq_len=8)
    simulation.add("a", [1, 2, 3], max_tokens=100)
    simulation.run()
    assert len(simulation.tokens("a")) == 5 and simulation.reason("a") == "length"


def test_a_prompt_that_tells_its_logits_is_computed_whole_and_in_bounded_steps(monkeypatch):
    monkeypatch.setattr(scheduler, "_MAX_TELLING", 3)
    simulation = Simulation(max_num_tokens=9)
    prompt = list(range(10))
    simulation.add("before", prompt)
    simulation.run()
    simulation.add("a", prompt, tells=True)
    simulation.add("b", prompt, tells=True)
    simulation.run()
    assert max(simulation.telling) == 3
    for request_id in ("a", "b"):
        assert simulation.told(request_id) == prompt[1:]
        assert simulation.events[request_id][0].num_cached_tokens == 0
        assert simulation.tokens(request_id) == simulation.tokens("before")


def test_a_step_in_vain_holds_its_blocks_until_it_is_over():
    simulation = Simulation(overlap=True)
    tokens = reference([1, 2, 3], 6)
    simulation.add("a", [1, 2, 3], max_tokens=6, stop=tokens[2])
    while simulation.reason("a") is None:
        simulation.step()
    assert (
        simulation.reason("a") == "stop" and simulation.tokens("a") == tokens[: tokens.index(tokens[2]) + 1]
    )
    assert simulation.under_way is not None and simulation.scheduler.pool.counts().active > 0
    simulation.step()
    assert simulation.scheduler.pool.counts().active == 0


def test_nothing_is_computed_in_vain_at_a_known_end():
    simulation = Simulation(overlap=True)
    simulation.add("a", [1, 2, 3], max_tokens=3)
    steps = [simulation.step() for _ in range(5)]
    assert steps == [1, 1, 1, 0, 0] and simulation.tokens("a") == reference([1, 2, 3], 3)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]),
    overlap=st.booleans(),
)
def test_anything_goes(seed, policy, overlap):
    """Random arrivals, aborts, fetches and leases: right tokens, one end each, blocks conserved after every step."""
    rng = random.Random(seed)
    simulation = Simulation(
        num_blocks=rng.randrange(8, 20),
        max_seq_len=30,
        policy=policy,
        max_num_tokens=rng.randrange(3, 20),
        overlap=overlap,
    )
    wanted: dict[str, tuple[list[int], int]] = {}
    told: dict[str, list[int] | None] = {}
    aborted: set[str] = set()
    for number in range(25):
        request_id = f"r{number}"
        prompt, max_tokens = random_prompt(rng, 1, 18), rng.randrange(1, 10)
        kind = rng.choice(["context_and_generation", "context_only", "generation_only"])
        fields = {}
        want = reference(prompt, max_tokens)
        if kind == "generation_only":
            max_tokens += 1
            want = reference(prompt, max_tokens)
            fields = {"output_token_ids": want[:1], "ticket": b"t"}
            want = want[1:]
        stop = rng.choice([*want, VOCAB])
        want = want[: want.index(stop) + 1] if stop in want else want
        tells = rng.random() < 0.3
        simulation.add(request_id, prompt, max_tokens, tells=tells, stop=stop, request_type=kind, **fields)
        wanted[request_id] = (want, 1 if kind == "context_only" else len(want))
        told[request_id] = prompt[1:] if tells and kind != "generation_only" else None
        for _ in range(rng.randrange(4)):
            simulation.step()
        if rng.random() < 0.2:
            victim = f"r{rng.randrange(number + 1)}"
            if simulation.reason(victim) is None:
                simulation.scheduler.abort(victim)
                aborted.add(victim)
        _disturb(simulation, rng)
    for _ in range(400):
        simulation.step()
        _disturb(simulation, rng)
    while simulation.fetches or simulation.leases:
        _disturb(simulation, rng)
        simulation.step()
    simulation.run()
    for request_id, (want, count) in wanted.items():
        if request_id in aborted and simulation.reason(request_id) == "cancelled":
            continue
        assert simulation.tokens(request_id) == want[:count], request_id
        assert simulation.told(request_id) == told[request_id], request_id
    counts = simulation.scheduler.pool.counts()
    assert counts.active == counts.leased == 0


def _disturb(simulation: Simulation, rng: random.Random) -> None:
    while simulation.fetches and rng.random() < 0.5:
        fetch = simulation.fetches.pop(rng.randrange(len(simulation.fetches)))
        (simulation.land if rng.random() < 0.7 else simulation.fail)(fetch)
    while simulation.leases and rng.random() < 0.5:
        simulation.scheduler.unlease(simulation.leases.pop(0))
