"""Triton kernels that draw tokens: rows of logits in, one token a row out, without leaving the device.

A row of logits is cut into pieces, so that a batch of one also fills the GPU. A drawn row costs three passes over its
logits, and a few more when top-k, top-p or min-p cut its tail off. Random numbers are a function of seed and draw alone
(SplitMix64), so a row's token does not depend on its batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained
from diptych.kernels.nucleus_triton import BLOCK, PIECE, exponentials, find_floors

_INF = tl.constexpr(float("inf"))


@triton.jit
def _partial_top(
    logits, slots, positions, prompt_lengths, min_tokens, ends, tops, ids, vocab, num_pieces,
    NUM_ENDS: tl.constexpr, PIECE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    columns = piece * PIECE + tl.arange(0, PIECE)
    inside = columns < vocab
    values = tl.load(logits + row * vocab + columns, mask=inside, other=-_INF)
    slot = tl.load(slots + row)
    at = tl.maximum(slot, 0)
    num_drawn = tl.load(positions + row) + 1 - tl.load(prompt_lengths + at)
    if (slot >= 0) & (num_drawn < tl.load(min_tokens + at)):
        for index in tl.static_range(NUM_ENDS):
            is_end = columns == tl.load(ends + index)
            values = tl.where(is_end, -_INF, values)
            tl.store(logits + row * vocab + columns, values, mask=is_end & inside)
    # A number that is none wins, so that it shows.
    values = tl.where(values == values, values, _INF)
    top, index = tl.max(values, 0, return_indices=True)
    tl.store(tops + row * num_pieces + piece, top)
    tl.store(ids + row * num_pieces + piece, piece * PIECE + index)


@triton.jit
def _join_top(tops, ids, highest, drawn, num_pieces, PIECES: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    pieces = tl.arange(0, PIECES)
    inside = pieces < num_pieces
    values = tl.load(tops + row * num_pieces + pieces, mask=inside, other=-_INF)
    top, index = tl.max(values, 0, return_indices=True)
    token = tl.load(ids + row * num_pieces + index)
    finite = (top < _INF) & (top > -_INF)
    tl.store(highest + row, top)
    tl.store(drawn + row, tl.where(finite, token, -1))


@triton.jit
def _masses(
    logits,
    highest,
    slots,
    temperatures,
    floors,
    masses,
    vocab,
    num_pieces,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sum of what is at least the row's floor, for each piece."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    slot = tl.load(slots + row)
    temperature = tl.load(temperatures + tl.maximum(slot, 0))
    if (slot >= 0) & (temperature > 0):
        top = tl.load(highest + row)
        floor = tl.load(floors + row)
        total = tl.zeros([1], tl.float64)
        for start in range(0, PIECE, BLOCK):
            columns = piece * PIECE + start + tl.arange(0, BLOCK)
            found = exponentials(logits, row, columns, vocab, top, temperature)
            total += tl.sum(tl.where(found >= floor, found, 0.0).to(tl.float64), 0)
        tl.store(masses + row * num_pieces + piece + tl.arange(0, 1), total)


@triton.jit
def _uniform(low, high, number):
    """SplitMix64 (Steele, Lea, Flood 2014) of a seed and the number of a draw, in [0, 1)."""
    seed = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(
        tl.uint64
    )
    state = seed * 0x9E3779B97F4A7C15 + (number + 1).to(tl.uint64) * 0xD1B54A32D192ED03
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return ((state ^ (state >> 31)) >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _pick(
    logits,
    highest,
    slots,
    positions,
    temperatures,
    prompt_lengths,
    seed_low,
    seed_high,
    floors,
    masses,
    drawn,
    vocab,
    num_pieces,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token where the cumulative sum, in the order of token ids, passes the row's random number."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    at = tl.maximum(slot, 0)
    temperature = tl.load(temperatures + at)
    greedy = tl.load(drawn + row)
    if (slot >= 0) & (temperature > 0) & (greedy >= 0):
        top = tl.load(highest + row)
        floor = tl.load(floors + row)
        pieces = tl.arange(0, PIECES)
        mass = tl.load(masses + row * num_pieces + pieces, mask=pieces < num_pieces, other=0.0)
        ends = tl.cumsum(mass, 0)
        number = tl.load(positions + row) + 1 - tl.load(prompt_lengths + at)
        target = _uniform(tl.load(seed_low + at), tl.load(seed_high + at), number) * tl.sum(mass, 0)
        piece = tl.minimum(tl.sum(((ends <= target) & (pieces < num_pieces)).to(tl.int32), 0), num_pieces - 1)
        before = tl.sum(tl.where(pieces < piece, mass, 0.0), 0)
        token = greedy  # rounding may leave the last sum short of the target
        start = piece * PIECE
        stop = tl.minimum(start + PIECE, vocab)
        while start < stop:
            columns = start + tl.arange(0, BLOCK)
            found = exponentials(logits, row, columns, vocab, top, temperature)
            kept = tl.where(found >= floor, found, 0.0).to(tl.float64)
            sums = before + tl.cumsum(kept, 0)
            passed = (sums > target) & (kept > 0)
            first = tl.min(tl.where(passed, columns, 0x7FFFFFFF), 0)
            if first < 0x7FFFFFFF:
                token = first
                start = stop
            else:
                before += tl.sum(kept, 0)
                start += BLOCK
        tl.store(drawn + row, token)


@dataclass(frozen=True, slots=True)
class DrawParameters:
    """By slot: temperature 0 is greedy, top_k 0 and top_p 1 are off. Floats are float32, the rest int32."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    prompt_lengths: Tensor
    min_tokens: Tensor  # so many before one of `ends` may be drawn
    seed_low: Tensor
    seed_high: Tensor
    ends: Tensor  # [any number] ids that end a sequence


def draw_greedy(
    logits: Tensor, slots: Tensor, positions: Tensor, parameters: DrawParameters
) -> tuple[Tensor, Tensor]:
    """Of `[T, vocab]` float32: the likeliest token `[T]` int32, -1 where logits are not finite, and its logit.

    `positions` are those of the rows' last known tokens; a sequence's draws count from the end of its prompt. What
    may not be drawn yet is minus infinity in `logits` afterwards.
    """
    rows, vocab = logits.shape
    pieces = triton.cdiv(vocab, PIECE)
    tops = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    highest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    drawn = torch.empty(rows, dtype=torch.int32, device=logits.device)
    p, chain = parameters, chained(logits.device)
    _partial_top[(rows, pieces)](
        logits, slots, positions, p.prompt_lengths, p.min_tokens, p.ends, tops, ids, vocab, pieces,
        NUM_ENDS=len(p.ends), PIECE=PIECE, num_warps=8, **chain,
    )  # fmt: skip
    _join_top[(rows,)](
        tops, ids, highest, drawn, pieces, PIECES=triton.next_power_of_2(pieces), num_warps=1, **chain
    )
    return drawn, highest


def draw_sampled(
    logits: Tensor,
    highest: Tensor,
    drawn: Tensor,
    slots: Tensor,
    positions: Tensor,
    parameters: DrawParameters,
) -> None:
    """Replace in `drawn` [T] the tokens of rows whose slot has a temperature; the rest stays as `draw_greedy` left it.

    `positions` are those of the rows' last known tokens; a sequence's draws count from the end of its prompt.
    """
    rows, vocab = logits.shape
    pieces = triton.cdiv(vocab, PIECE)
    masses = torch.empty(rows, pieces, dtype=torch.float64, device=logits.device)
    p, chain = parameters, chained(logits.device)

    def sum_pieces(floors: Tensor) -> None:
        _masses[(rows, pieces)](
            logits, highest, slots, p.temperature, floors, masses, vocab, pieces,
            BLOCK=BLOCK, PIECE=PIECE, num_warps=4, **chain,
        )  # fmt: skip

    sum_pieces(torch.zeros(rows, dtype=torch.float32, device=logits.device))
    floors = find_floors(
        logits,
        highest,
        slots,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        totals=masses,
    )
    sum_pieces(floors)
    _pick[(rows,)](
        logits, highest, slots, positions, p.temperature, p.prompt_lengths, p.seed_low, p.seed_high,
        floors, masses, drawn, vocab, pieces,
        PIECES=triton.next_power_of_2(pieces), PIECE=PIECE, BLOCK=BLOCK, num_warps=4, **chain,
    )  # fmt: skip
