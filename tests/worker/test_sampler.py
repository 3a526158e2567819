import math

import pytest
import torch

from diptych.wire import SamplingParams
from diptych.worker.sampler import Row, Sampler, uniform

VOCAB = 1000


def row(prompt=(1,), outputs=(), **params):
    return Row(SamplingParams(max_tokens=10, **params), list(prompt), list(outputs))


def sample(logits, *rows):
    return [drawn.token_id for drawn in Sampler(frozenset({7})).sample(logits.clone(), list(rows))]


def random_logits(rows, seed=0, scale=3.0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def frequencies(logits, draws, **params):
    counts = torch.zeros(VOCAB)
    for start in range(0, draws, 500):
        rows = [row(seed=start + index, temperature=1.0, **params) for index in range(500)]
        for token in sample(logits.expand(500, -1), *rows):
            counts[token] += 1
    return counts / draws


def test_temperature_zero_is_argmax():
    logits = random_logits(3)
    assert sample(logits, *[row(temperature=0.0)] * 3) == logits.argmax(-1).tolist()


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_position():
    drawn = [uniform(seed, position) for seed in range(100) for position in range(100)]
    numbers = torch.tensor(drawn, dtype=torch.float64)
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert float(numbers.std()) == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    assert len(set(drawn)) == 10_000


def test_a_draw_is_the_same_whatever_else_is_in_the_batch():
    logits = random_logits(16)
    rows = [row(seed=index, temperature=0.8, top_p=0.9, outputs=[5] * index) for index in range(16)]
    together = sample(logits, *rows)
    alone = [sample(logits[index : index + 1], rows[index])[0] for index in range(16)]
    mixed = sample(logits.flip(0), *rows[::-1])[::-1]
    assert together == alone == mixed


def test_draws_follow_the_distribution():
    logits = torch.full((1, VOCAB), -30.0)
    logits[0, :4] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    seen = frequencies(logits, 8000)
    assert seen[:4].tolist() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.025)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # 0.5 + 0.25 of 0.9 reaches 0.8
    ],
)
def test_truncation_keeps_exactly_the_likely_tokens(params, allowed):
    logits = torch.full((1, VOCAB), -30.0)
    logits[0, :4] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    seen = frequencies(logits, 2000, **params)
    assert set(seen.nonzero().squeeze(1).tolist()) == allowed


def test_a_wide_nucleus_is_exact_too():
    logits = torch.zeros(1, VOCAB)  # all equal: half of them make 0.5
    logits[0, :600] = 1.0
    seen = frequencies(logits, 4000, top_p=0.8)
    probs = torch.softmax(logits[0], -1)
    assert float(probs[:600].sum()) > 0.8
    assert float(seen[600:].sum()) == 0.0


def test_penalties_and_bias():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4], logits[0, 5] = 2.0, 1.9, 1.7
    greedy = {"temperature": 0.0}
    assert sample(logits, row(outputs=[3], presence_penalty=0.2, **greedy)) == [4]
    assert sample(logits, row(outputs=[3, 3, 4], frequency_penalty=0.25, **greedy)) == [5]
    assert sample(logits, row(prompt=[3], repetition_penalty=1.1, **greedy)) == [4]
    assert sample(logits, row(prompt=[3], presence_penalty=1.0, **greedy)) == [3], "only outputs count"
    assert sample(logits, row(logit_bias={9: 50.0}, **greedy)) == [9]
    logits[0, 3] = -1.0
    assert sample(logits - 5, row(prompt=[4], repetition_penalty=1.5, **greedy)) == [5], "negative logits too"


def test_min_tokens_bans_the_ends():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (8,)}
    assert sample(logits, row(outputs=[1], **params)) == [9]
    assert sample(logits, row(outputs=[1, 2], **params)) == [7]


def test_logprobs_are_of_the_untouched_distribution():
    logits = random_logits(1)
    want = torch.log_softmax(logits[0], -1)
    params = SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=3, logit_bias={11: 100.0})
    (drawn,) = Sampler(frozenset()).sample(logits.clone(), [Row(params, [1], [])])
    assert drawn.logprob.token_id == 11
    assert drawn.logprob.logprob == pytest.approx(float(want[11]))
    assert [token for token, _ in drawn.logprob.top] == want.topk(3).indices.tolist()


def test_not_a_number_is_an_error_of_that_row_only():
    logits = random_logits(2)
    logits[0] = torch.nan
    bad, good = Sampler(frozenset()).sample(logits, [row(temperature=0.0), row(temperature=0.0)])
    assert isinstance(bad, str) and good.token_id == int(logits[1].argmax())
