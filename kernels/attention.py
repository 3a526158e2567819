"""Attention on a paged KV cache, in plain torch: the reference of every device kernel, and the portable path.

`plan_attention` looks at a step once; `append_kv` and `paged_attention` then run for every layer with that
plan. A layer's cache is `[num_blocks, 2, num_kv_heads, tokens_per_block, head_dim]`, K at index 0 and V at
index 1, and may be strided. Slots that were never written may hold anything, NaN included: only slots of a
sequence's context are read. Knows nothing of models or scheduling.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """The rows of one sequence, and the part of its context that they can see."""

    start: int  # first row
    stop: int
    block_ids: Tensor  # blocks that hold the visible context
    skip: int  # slots at the front of the first block that no row sees
    length: int  # visible context of all rows together
    mask: (
        Tensor | None
    )  # [rows, length], True = visible; None when `causal` says it all or one row sees everything
    causal: bool  # rows are the whole visible context: a plain lower triangle


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where a step's rows go and what they attend to; the same for all layers."""

    slot_blocks: Tensor  # [T] block that takes a row's K and V
    slot_offsets: Tensor  # [T] slot inside it
    spans: tuple[SequenceSpan, ...]


def plan_attention(
    *,
    positions: npt.NDArray[np.integer],  # [T]
    query_starts: npt.NDArray[np.integer],  # [S + 1]
    block_tables: npt.NDArray[np.integer],  # [S, max_blocks]
    tokens_per_block: int,
    sliding_window: int | None,
    device: torch.device,
) -> AttentionPlan:
    """A row at position p sees positions 0 to p, or the last `sliding_window` of them."""
    sequence_of_row = np.repeat(np.arange(len(query_starts) - 1), np.diff(query_starts))
    slot_blocks = block_tables[sequence_of_row, positions // tokens_per_block].astype(np.int64)
    spans = tuple(
        _span(positions[start:stop], int(start), table, tokens_per_block, sliding_window, device)
        for start, stop, table in zip(query_starts[:-1], query_starts[1:], block_tables, strict=True)
    )
    return AttentionPlan(
        slot_blocks=torch.from_numpy(slot_blocks).to(device),
        slot_offsets=torch.from_numpy((positions % tokens_per_block).astype(np.int64)).to(device),
        spans=spans,
    )


def _span(
    positions: npt.NDArray[np.integer],
    start: int,
    table: npt.NDArray[np.integer],
    tokens_per_block: int,
    sliding_window: int | None,
    device: torch.device,
) -> SequenceSpan:
    count = len(positions)
    end = int(positions[-1]) + 1
    begin = 0 if sliding_window is None else max(0, int(positions[0]) + 1 - sliding_window)
    first_block, last_block = begin // tokens_per_block, -(-end // tokens_per_block)
    windowed = sliding_window is not None and end - begin > sliding_window
    causal = count > 1 and count == end - begin and not windowed
    return SequenceSpan(
        start=start,
        stop=start + count,
        block_ids=torch.from_numpy(table[first_block:last_block].astype(np.int64)).to(device),
        skip=begin - first_block * tokens_per_block,
        length=end - begin,
        mask=None if count == 1 or causal else _mask(positions, begin, end, sliding_window, device),
        causal=causal,
    )


def _mask(
    positions: npt.NDArray[np.integer], begin: int, end: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    rows = torch.from_numpy(positions.astype(np.int64)).to(device)[:, None]
    keys = torch.arange(begin, end, device=device)[None, :]
    visible = keys <= rows
    return visible if sliding_window is None else visible & (keys > rows - sliding_window)


def append_kv(key: Tensor, value: Tensor, cache: Tensor, plan: AttentionPlan) -> None:
    """Write the rows' K and V, `[T, num_kv_heads, head_dim]`, into their slots.

    A cache in float8_e4m3fn takes what is beyond its range as its largest number.
    """
    if cache.dtype == torch.float8_e4m3fn:
        key, value = (x.clamp(-_FP8_MAX, _FP8_MAX) for x in (key, value))
    cache[plan.slot_blocks, 0, :, plan.slot_offsets] = key.to(cache.dtype)
    cache[plan.slot_blocks, 1, :, plan.slot_offsets] = value.to(cache.dtype)


def paged_attention(query: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """`[T, num_heads, head_dim]` queries over their sequences' cached K and V; same shape out."""
    output = torch.empty_like(query)
    for span in plan.spans:
        output[span.start : span.stop] = _attend(query[span.start : span.stop], cache, span, scale)
    return output


def _attend(query: Tensor, cache: Tensor, span: SequenceSpan, scale: float) -> Tensor:
    rows, num_heads, head_dim = query.shape
    key, value = _gather(cache, span, query.dtype)
    num_kv_heads = key.shape[0]
    group = num_heads // num_kv_heads
    if rows == 1:
        # The query heads of one kv head are rows of one small product: no copy of K and V per head.
        grouped = query.view(1, num_kv_heads, group, head_dim)
        decoded = F.scaled_dot_product_attention(grouped, key[None], value[None], scale=scale)
        return decoded.reshape(1, num_heads, head_dim)
    heads = query.view(rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    attended = F.scaled_dot_product_attention(
        heads,
        key[:, None].expand(-1, group, -1, -1),
        value[:, None].expand(-1, group, -1, -1),
        attn_mask=span.mask,
        is_causal=span.causal,
        scale=scale,
    )
    return attended.permute(2, 0, 1, 3).reshape(rows, num_heads, head_dim)


def _gather(cache: Tensor, span: SequenceSpan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The visible K and V of one sequence, each `[num_kv_heads, length, head_dim]`."""
    blocks = cache[span.block_ids].to(dtype)
    num_kv_heads, head_dim = blocks.shape[2], blocks.shape[4]
    flat = blocks.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
    visible = flat[:, :, span.skip : span.skip + span.length]
    return visible[0], visible[1]
