"""Logits to tokens.

A draw depends on the row's logits, its parameters and (seed, position) alone: the random number comes from a counter,
not from a generator with state. So a sequence draws the same tokens whatever else is in its batch, on whichever
worker it runs, and after a restart in the middle.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.wire import Logprob, SamplingParams
from diptych.worker.plan import Drawn

_MASK = (1 << 64) - 1
_NUCLEUS_GUESS = (
    512  # most nuclei are smaller: sorting this many is 50 times cheaper than sorting a vocabulary
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: its parameters and the tokens before it."""

    params: SamplingParams
    prompt: list[int]
    outputs: list[int]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one draw: SplitMix64 (Steele, Lea, Flood 2014) of the seed and the token's position."""
    state = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


class Sampler:
    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = sorted(eos_token_ids)

    def sample(self, logits: Tensor, rows: list[Row]) -> list[Drawn | str]:
        """Draw one token for each row of `logits` [R, vocab] float32, which may be changed in place.

        A row that cannot be drawn from (not-a-number logits) gives the reason instead.
        """
        logprobs = _logprobs(logits, rows)
        for index, row in enumerate(rows):
            self._adjust(logits[index], row)
        token_ids = logits.argmax(dim=-1)
        random = [index for index, row in enumerate(rows) if row.params.temperature > 0]
        if random:
            token_ids[random] = _draw(logits[random], [rows[index] for index in random])
        chosen = token_ids.tolist()
        finite = logits.gather(1, token_ids[:, None]).squeeze(1).isfinite().tolist()
        return [
            Drawn(token_id, logprobs[index](token_id) if index in logprobs else None)
            if finite[index]
            else "the model computed logits that are not numbers"
            for index, token_id in enumerate(chosen)
        ]

    def _adjust(self, logits: Tensor, row: Row) -> None:
        """Apply penalties, biases and bans to one row, in place, in the order of OpenAI's and HF's definitions."""
        params = row.params
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*row.prompt, *row.outputs}), device=logits.device)
            values = logits[seen]
            penalty = params.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if (params.presence_penalty or params.frequency_penalty) and row.outputs:
            counts = Counter(row.outputs)
            drawn = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
            logits[drawn] -= params.presence_penalty + params.frequency_penalty * times
        if params.logit_bias:
            biased = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[biased] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if len(row.outputs) < params.min_tokens:
            logits[[*self._eos, *params.stop_token_ids]] = -torch.inf


def _draw(logits: Tensor, rows: list[Row]) -> Tensor:
    """One token a row [R]: the inverse of the cumulative distribution, over token ids in their order."""
    device = logits.device
    temperature = torch.tensor([row.params.temperature for row in rows], device=device)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    floor = torch.tensor([row.params.min_p for row in rows], device=device) * probs.amax(dim=-1)
    floor = torch.maximum(floor, _nucleus_floor(probs, rows))
    probs = torch.where(probs >= floor[:, None], probs, 0.0)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    numbers = [uniform(row.params.seed, len(row.outputs)) for row in rows]
    target = torch.tensor(numbers, dtype=torch.float64, device=device) * cumulative[:, -1]
    return (
        torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    )


def _nucleus_floor(probs: Tensor, rows: list[Row]) -> Tensor:
    """For each row [R] the smallest probability that top_k and then top_p keep."""
    vocab = probs.shape[1]
    floor = torch.zeros(len(rows), device=probs.device)
    for index, row in enumerate(rows):
        top_k, top_p = row.params.top_k or vocab, row.params.top_p
        if top_k >= vocab and top_p >= 1.0:
            continue
        guess = min(vocab, top_k if top_k < vocab else _NUCLEUS_GUESS)
        sorted_probs = probs[index].topk(guess).values
        if top_k >= vocab and guess < vocab and float(sorted_probs.sum()) < top_p:
            sorted_probs = probs[index].sort(descending=True).values
        if top_p < 1.0:
            mass = sorted_probs.cumsum(0)
            # top_p applies to what top_k left, renormalised.
            total = float(mass[-1]) if top_k < vocab else 1.0
            keep = int((mass < top_p * total).sum()) + 1
            floor[index] = sorted_probs[min(keep, sorted_probs.numel()) - 1]
        else:
            floor[index] = sorted_probs[-1]
    return floor


def token_logprobs(logits: Tensor, token_ids: list[int], num_top: int) -> list[Logprob]:
    """For each row of `logits` [R, vocab] the given token's log probability, and the `num_top` likeliest."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]).squeeze(1).tolist()
    top = logprobs.topk(num_top)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        Logprob(token_id, logprob, list(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(token_ids, chosen, pairs, strict=True)
    ]


class _RowLogprobs:
    """The log probabilities of one row before anything was applied to it."""

    def __init__(self, logprobs: Tensor, num_top: int) -> None:
        self._logprobs = logprobs
        self._num_top = num_top

    def __call__(self, token_id: int) -> Logprob:
        top = self._logprobs.topk(self._num_top)
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Logprob(token_id, float(self._logprobs[token_id]), pairs)


def _logprobs(logits: Tensor, rows: list[Row]) -> dict[int, _RowLogprobs]:
    return {
        index: _RowLogprobs(torch.log_softmax(logits[index], dim=-1), row.params.num_logprobs)
        for index, row in enumerate(rows)
        if row.params.num_logprobs is not None
    }
