"""Triton kernels that read and advance a batch whose state stays on the device.

A step's row r belongs to slot `slots[r]` of the state (negative: padding). Nothing of a step needs the host: the token
that a row drew is the next step's input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.dependent_launch_triton import follow
from diptych.kernels.gpu import chained

_BLOCK = 256


@triton.jit(do_not_specialize=["count"])
def _gather(
    slots, tokens, positions, row_tokens, row_positions, count, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    follow(PDL)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    slot = tl.load(slots + rows, mask=inside, other=-1)
    live = inside & (slot >= 0)
    tl.store(row_tokens + rows, tl.load(tokens + slot, mask=live, other=0), mask=inside)
    tl.store(row_positions + rows, tl.load(positions + slot, mask=live, other=-1), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _fill_tokens(row_tokens, slots, tokens, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    unknown = inside & (tl.load(row_tokens + rows, mask=inside, other=0) < 0)
    slot = tl.load(slots + rows, mask=unknown, other=0)
    tl.store(row_tokens + rows, tl.load(tokens + slot, mask=unknown, other=0), mask=unknown)


@triton.jit(do_not_specialize=["count"])
def _advance(slots, row_positions, drawn, tokens, positions, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    slot = tl.load(slots + rows, mask=inside, other=-1)
    live = inside & (slot >= 0)
    token = tl.load(drawn + rows, mask=live, other=0)
    tl.store(tokens + slot, tl.maximum(token, 0), mask=live)
    tl.store(positions + slot, tl.load(row_positions + rows, mask=live, other=0) + 1, mask=live)


def gather_rows(slots: Tensor, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' tokens and positions, `[T]` each; padding has token 0 at position -1. All int32."""
    row_tokens, row_positions = torch.empty_like(slots), torch.empty_like(slots)
    grid = (triton.cdiv(len(slots), _BLOCK),)
    _gather[grid](
        slots, tokens, positions, row_tokens, row_positions, len(slots), BLOCK=_BLOCK, **chained(slots.device)
    )
    return row_tokens, row_positions


def fill_tokens(row_tokens: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Where `row_tokens` [T] is negative, the host did not know the token yet: take the slot's. All int32."""
    grid = (triton.cdiv(len(slots), _BLOCK),)
    _fill_tokens[grid](row_tokens, slots, tokens, len(slots), BLOCK=_BLOCK, **chained(slots.device))


def advance_rows(
    slots: Tensor, row_positions: Tensor, drawn: Tensor, tokens: Tensor, positions: Tensor
) -> None:
    """What the rows drew `[T]` becomes the state of their slots, one position on. All int32."""
    grid = (triton.cdiv(len(slots), _BLOCK),)
    _advance[grid](
        slots, row_positions, drawn, tokens, positions, len(slots), BLOCK=_BLOCK, **chained(slots.device)
    )
