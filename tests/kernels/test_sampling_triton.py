"""Draws on the device against the worker's sampler: the same numbers, the same tokens."""

import os

import numpy as np
import pytest
import torch

from diptych.wire import SamplingParams
from diptych.worker.device_state import DeviceState, float_bits, seed_words
from diptych.worker.sampler import Row, Sampler

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"),
        reason="there is no GPU, and TRITON_INTERPRET is not 1",
    ),
]

ENDS = frozenset({2, 17})
PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3, "seed": 2**63 + 12345},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.5, "top_k": 20},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 10**6, "top_p": 0.999, "min_p": 0.01, "seed": 99},
]


def draw(logits, params, num_prompt, num_outputs):
    from diptych.worker.decode import Draw

    count = len(params)
    state = DeviceState(count, 1, DEVICE)
    changes = {}
    for slot, param in enumerate(params):
        low, high = seed_words(param.seed)
        fields = {
            "temperature": float_bits(param.temperature),
            "top_k": param.top_k,
            "top_p": float_bits(param.top_p),
            "min_p": float_bits(param.min_p),
            "min_tokens": param.min_tokens,
            "prompt_lengths": num_prompt,
            "seed_low": low,
            "seed_high": high,
        }
        changes |= {state.at(name, slot): value for name, value in fields.items()}
    state.upload(np.array(list(changes), np.int32), np.array(list(changes.values()), np.int32))
    slots = torch.arange(count, dtype=torch.int32, device=DEVICE)
    positions = torch.full((count,), num_prompt + num_outputs - 1, dtype=torch.int32, device=DEVICE)
    return Draw(state, ENDS).run(logits, slots, positions, sampled=True).tolist()


@pytest.mark.parametrize("vocab", [131, 9000] if not ON_GPU else [131, 9000, 49152, 128256])
def test_draws_are_those_of_the_sampler(vocab):
    generator = torch.Generator().manual_seed(vocab)
    params = [
        SamplingParams(**{"max_tokens": 100, "seed": 7 * index, **fields})
        for index, fields in enumerate(PARAMS)
    ]
    agreed = total = 0
    for draw_number in range(2 if not ON_GPU else 20):
        logits = torch.randn(len(params), vocab, generator=generator) * 3
        rows = [Row(param, [1] * 5, [2] * draw_number) for param in params]
        expected = [drawn.token_id for drawn in Sampler(frozenset()).sample(logits.clone(), rows)]
        actual = draw(logits.to(DEVICE), params, 5, draw_number)
        agreed += sum(a == b for a, b in zip(actual, expected, strict=True))
        total += len(params)
        assert actual[0] == expected[0] and actual[3] == expected[3], "greedy ones have no rounding"
    # exp on a device rounds otherwise: a draw may fall on the other side of a boundary, once in thousands.
    assert agreed >= total - total // 100, f"{agreed} of {total}"


def test_equal_logits_at_the_cut():
    """Ties at top-k stay together, as in the sampler."""
    logits = torch.zeros(1, 200)
    logits[0, 50:60] = 2.0
    params = [SamplingParams(max_tokens=5, temperature=1.0, top_k=3, seed=5)]
    seen = {draw(logits.clone().to(DEVICE), params, 1, number)[0] for number in range(12)}
    expected = {
        Sampler(frozenset()).sample(logits.clone(), [Row(params[0], [1], [2] * n)])[0].token_id
        for n in range(12)
    }
    assert seen == expected and seen <= set(range(50, 60))


def test_few_tokens_have_any_probability():
    """top_k asks for more tokens than there are with a probability that a float32 can hold."""
    logits = torch.full((1, 300), -200.0)
    logits[0, [7, 150, 299]] = torch.tensor([1.0, 1.2, 0.8])
    params = [SamplingParams(max_tokens=5, temperature=1.0, top_k=40, top_p=0.8, seed=5)]
    for number in range(8):
        row = Row(params[0], [1], [2] * number)
        expected = Sampler(frozenset()).sample(logits.clone(), [row])[0].token_id
        assert draw(logits.clone().to(DEVICE), params, 1, number) == [expected]


def test_logits_that_are_no_numbers():
    logits = torch.zeros(3, 300)
    logits[0, 299] = torch.nan
    logits[1] = -torch.inf
    params = [SamplingParams(max_tokens=5, temperature=t) for t in (1.0, 0.0, 0.0)]
    assert draw(logits.to(DEVICE), params, 1, 0) == [-1, -1, 0]


def test_ends_may_not_be_drawn_too_early():
    logits = torch.zeros(4, 9000)
    logits[:, 2], logits[:, 17], logits[:, 8999] = 9.0, 8.0, 7.0
    params = [
        SamplingParams(max_tokens=9, temperature=0.0, min_tokens=3),
        SamplingParams(max_tokens=9, temperature=0.01, min_tokens=3, seed=1),
        SamplingParams(max_tokens=9, temperature=1.0, top_k=1, min_tokens=3),
        SamplingParams(max_tokens=9, temperature=0.0),
    ]
    assert draw(logits.clone().to(DEVICE), params, 5, 2) == [8999, 8999, 8999, 2]
    assert draw(logits.clone().to(DEVICE), params, 5, 3) == [2, 2, 2, 2]
