"""Triton kernels that find what top-k, top-p and min-p leave of a row: the smallest probability that is kept.

Bisection over the bits of floats in [0, 1]: each round tries several thresholds on all pieces of all rows at once, and
the next round's programs read off, each for itself, between which two the answer lies. Two searches, one after the
other, since top-p applies to what top-k has left. The number of rounds is fixed, so that a CUDA graph can hold them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained

PIECE = 8192  # tokens of a row that one program looks at
BLOCK = 1024
_PROBES = tl.constexpr(4)  # thresholds of a round: few, since each is a comparison of every logit
_ROUNDS = 14  # leave one float of the 2^30
_ABOVE_ONE = tl.constexpr(0x3F800001)
_INF = tl.constexpr(float("inf"))
# What a kernel does with the round before it.
_BEGIN, _COUNTS, _SWITCH, _MASSES, _END = (tl.constexpr(mode) for mode in range(5))


@triton.jit
def exponentials(logits, row, columns, vocab, highest, temperature):
    """Probabilities but for their sum: 1 for the likeliest token."""
    values = tl.load(logits + row * vocab + columns, mask=columns < vocab, other=-_INF)
    return tl.exp((values - highest) / temperature)


@triton.jit
def _is_open(low, high, low_count, high_count):
    """One token between the two bounds: it is the one. Equal tokens stay together until the bits are used up."""
    return (high - low > 1) & ((low_count - high_count > 1) | (low == 0))


@triton.jit
def _thresholds(low, high):
    """Bits of ascending floats between the bounds."""
    step = tl.maximum((high - low) // (_PROBES + 1), 1)
    return tl.minimum(low + step * (tl.arange(0, _PROBES) + 1), high - 1)


@triton.jit
def _fold(
    low, high, low_count, high_count, low_mass, counts, masses, wanted, num_pieces,
    BY_COUNT: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The bounds after a round: the last threshold that leaves enough, and the first that does not."""
    pieces = tl.arange(0, PIECES)[:, None]
    at = pieces * _PROBES + tl.arange(0, _PROBES)[None, :]
    inside = pieces < num_pieces
    count = tl.sum(tl.load(counts + at, mask=inside, other=0), 0)
    mass = tl.sum(tl.load(masses + at, mask=inside, other=0.0), 0)
    bits = _thresholds(low, high)
    if BY_COUNT:
        enough = count >= wanted
    else:
        enough = mass >= wanted
    new_low_count = tl.minimum(tl.min(tl.where(enough, count, 0x7FFFFFFF), 0), low_count)
    new_low_mass = tl.minimum(tl.min(tl.where(enough, mass, _INF), 0), low_mass)
    new_high_count = tl.maximum(tl.max(tl.where(enough, 0, count), 0), high_count)
    new_low = tl.maximum(tl.max(tl.where(enough, bits, 0), 0), low)
    new_high = tl.minimum(tl.min(tl.where(enough, high, bits), 0), high)
    return new_low, new_high, new_low_count, new_high_count, new_low_mass


@triton.jit
def _last_round(
    bounds, bound_masses, counts, masses, row, wanted, num_pieces,
    BY_COUNT: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Bounds, counts and mass after the round that wrote to `row`."""
    state = bounds + row * 4
    low = tl.load(state)
    high = tl.load(state + 1)
    low_count = tl.load(state + 2)
    high_count = tl.load(state + 3)
    low_mass = tl.load(bound_masses + row)
    if _is_open(low, high, low_count, high_count):
        part = row * num_pieces * _PROBES
        low, high, low_count, high_count, low_mass = _fold(
            low, high, low_count, high_count, low_mass, counts + part, masses + part, wanted, num_pieces,
            BY_COUNT, PIECES,
        )  # fmt: skip
    return low, high, low_count, high_count, low_mass


@triton.jit
def _probe(
    logits, counts, masses, row, piece, vocab, top, temperature, low, high,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one piece: how many tokens reach each threshold, and their mass."""
    thresholds = _thresholds(low, high).to(tl.float32, bitcast=True)
    count = tl.zeros([_PROBES], tl.int32)
    mass = tl.zeros([_PROBES], tl.float64)
    for start in range(0, PIECE, BLOCK):
        columns = piece * PIECE + start + tl.arange(0, BLOCK)
        found = exponentials(logits, row, columns, vocab, top, temperature)
        above = (found[None, :] >= thresholds[:, None]) & (columns < vocab)[None, :]
        count += tl.sum(above.to(tl.int32), 1)
        mass += tl.sum(tl.where(above, found[None, :], 0.0), 1).to(tl.float64)
    probes = tl.arange(0, _PROBES)
    tl.store(counts + probes, count)
    tl.store(masses + probes, mass)


@triton.jit(do_not_specialize=["before", "after"])
def _round(
    logits, highest, slots, temperatures, top_ks, top_ps, min_ps, totals,
    bounds, bound_masses, counts, masses, wanted_masses, floors, before, after, vocab, num_pieces,
    MODE: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`before` and `after`: offsets in rows of the last round's results and of this one's."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    slot = tl.load(slots + row)
    at = tl.maximum(slot, 0)
    temperature = tl.load(temperatures + at)
    top_k = tl.load(top_ks + at)
    top_p = tl.load(top_ps + at)
    drawn = (slot >= 0) & (temperature > 0)
    has_k = drawn & (top_k > 0) & (top_k < vocab)
    has_p = drawn & (top_p < 1.0)
    searches = has_k if MODE == _BEGIN or MODE == _COUNTS else has_p
    folds_counts: tl.constexpr = MODE == _COUNTS or MODE == _SWITCH
    if drawn:
        all_pieces = tl.arange(0, PIECES)
        sums = tl.load(totals + row * num_pieces + all_pieces, mask=all_pieces < num_pieces, other=0.0)
        low = 0
        high = _ABOVE_ONE
        low_count = vocab
        high_count = 0
        low_mass = tl.sum(sums, 0)
        if MODE != _BEGIN:
            if has_k if folds_counts else has_p:
                wanted = top_k if folds_counts else tl.load(wanted_masses + row)
                low, high, low_count, high_count, low_mass = _last_round(
                    bounds,
                    bound_masses,
                    counts,
                    masses,
                    before + row,
                    wanted,
                    num_pieces,
                    folds_counts,
                    PIECES,
                )
        if MODE == _SWITCH:
            least = tl.cast(low, tl.float32, bitcast=True)
            floor = tl.load(min_ps + at)
            total = tl.sum(sums, 0)
            if has_k:
                floor = tl.maximum(floor, least)
                # Of equal tokens only as many count as top-k asks for.
                total = low_mass - (low_count - top_k).to(tl.float64) * least.to(tl.float64)
            if piece == 0:
                tl.store(floors + row, floor)
                tl.store(wanted_masses + row, top_p.to(tl.float64) * total)
            low = 0
            high = _ABOVE_ONE
            low_count = vocab
            high_count = 0
            low_mass = tl.sum(sums, 0)
        if MODE == _END:
            floor = tl.load(min_ps + at)
            if has_k | has_p:
                floor = tl.load(floors + row)
            if has_p:
                floor = tl.maximum(floor, tl.cast(low, tl.float32, bitcast=True))
            tl.store(floors + row, floor)
        elif searches:
            if piece == 0:
                state = bounds + (after + row) * 4
                tl.store(state, low)
                tl.store(state + 1, high)
                tl.store(state + 2, low_count)
                tl.store(state + 3, high_count)
                tl.store(bound_masses + after + row, low_mass)
            if _is_open(low, high, low_count, high_count):
                part = ((after + row) * num_pieces + piece) * _PROBES
                top = tl.load(highest + row)
                _probe(
                    logits, counts + part, masses + part, row, piece, vocab, top, temperature, low, high,
                    PIECE, BLOCK,
                )  # fmt: skip


def find_floors(
    logits: Tensor,
    highest: Tensor,
    slots: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    totals: Tensor,
) -> Tensor:
    """`[T]` float32: what `exp((logit - highest) / temperature)` must at least be to be kept, for `[T, vocab]` logits.

    The parameters are by slot, `slots[r]` is row r's (negative: none); rows without a temperature get nothing.
    `totals` [T, pieces] float64 are the sums of each piece of PIECE exponentials.
    """
    rows, vocab = logits.shape
    pieces = totals.shape[1]
    device = logits.device
    bounds = torch.empty(2 * rows, 4, dtype=torch.int32, device=device)
    counts = torch.empty(2 * rows, pieces, _PROBES.value, dtype=torch.int32, device=device)
    floors = torch.empty(rows, dtype=torch.float32, device=device)
    masses = torch.empty(counts.shape, dtype=torch.float64, device=device)
    scratch = bounds, torch.empty(2 * rows, dtype=torch.float64, device=device), counts, masses
    wanted = torch.empty(rows, dtype=torch.float64, device=device)
    counting = [_BEGIN, *[_COUNTS] * (_ROUNDS - 1)]
    for number, mode in enumerate([*counting, _SWITCH, *[_MASSES] * (_ROUNDS - 1), _END]):
        before, after = (rows, 0) if number % 2 == 0 else (0, rows)
        _round[(rows, 1 if mode is _END else pieces)](
            logits, highest, slots, temperature, top_k, top_p, min_p, totals, *scratch, wanted, floors,
            before, after, vocab, pieces,
            MODE=mode.value, PIECES=triton.next_power_of_2(pieces), PIECE=PIECE, BLOCK=BLOCK,
            num_warps=4, **chained(device),
        )  # fmt: skip
    return floors
