"""Triton kernels of block_copy.py and block_digest.py; see there for what they compute.

One kernel, and as many programs as the caller allows: each takes one share of a row after the other. A share
is cut into tiles of 32 KiB that are loaded in one burst, so that few programs keep a whole link busy: the rest
of the GPU goes on computing.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.block_copy import CopyGrid
from diptych.kernels.block_digest import KEY_MULTIPLIERS, WORD_BYTES

_TILE_WORDS = 4096
_NUM_WARPS = 16
_SHARES_PER_PROGRAM = 8  # enough that no program waits long for the last ones
_MAX_SHARE_TILES = 16
_DIGEST_PROGRAMS = 264

_FIRST = tl.constexpr(KEY_MULTIPLIERS[0])
_SECOND = tl.constexpr(KEY_MULTIPLIERS[1])
_THIRD = tl.constexpr(KEY_MULTIPLIERS[2])


@triton.jit
def _terms(words, positions):
    bits = words.to(tl.uint64, bitcast=True)
    mixed = positions.to(tl.uint32) * _FIRST
    mixed = mixed ^ (mixed >> 15)
    low = bits.to(tl.uint32) + mixed * _SECOND
    high = (bits >> 32).to(tl.uint32) + (mixed + _THIRD) * _THIRD
    return (low.to(tl.uint64) * high.to(tl.uint64) + bits).to(tl.int64, bitcast=True)


@triton.jit
def _place(cells, tile, tiles_in_cell, tiles_in_row, TILE: tl.constexpr, SPANS: tl.constexpr):
    """Where the tiles from number `tile` of a row on start, after the row's own start."""
    number = tile + tl.arange(0, SPANS)
    inside = (number % tiles_in_cell) * TILE
    return tl.load(cells + number // tiles_in_cell, mask=number < tiles_in_row, other=0) + inside


# Not specialised: each kind of value would be compiled anew, in the middle of a transfer.
@triton.jit(
    do_not_specialize=["num_rows", "num_cells", "tiles_in_cell", "tiles_in_share", "shares_in_row"],
)
def _move(
    source,
    destination,
    grid,
    digests,
    num_rows,
    num_cells,
    tiles_in_cell,
    tiles_in_share,
    shares_in_row,
    TILE: tl.constexpr,  # words that are contiguous on both sides
    SPANS: tl.constexpr,  # such tiles in one burst
    COPY: tl.constexpr,
    DIGEST: tl.constexpr,
):
    from_cells = grid + 4 * num_rows
    to_cells = from_cells + num_cells
    tiles_in_row = num_cells * tiles_in_cell
    lane = tl.arange(0, TILE)[None, :]
    for share in range(tl.program_id(0), num_rows * shares_in_row, tl.num_programs(0)):
        row = share // shares_in_row
        first = (share % shares_in_row) * tiles_in_share
        row_source = tl.load(grid + row)
        row_destination = tl.load(grid + num_rows + row)
        row_inside = tl.load(grid + 2 * num_rows + row)
        total = tl.zeros([SPANS, TILE], tl.int64)
        start = _place(from_cells, first, tiles_in_cell, tiles_in_row, TILE, SPANS)
        end = _place(to_cells, first, tiles_in_cell, tiles_in_row, TILE, SPANS)
        for tile in range(first, min(first + tiles_in_share, tiles_in_row), SPANS):
            mask = (tile + tl.arange(0, SPANS) < tiles_in_row)[:, None]
            read = row_source + start[:, None] + lane
            read = tl.max_contiguous(tl.multiple_of(read, (1, 2)), (1, TILE))
            words = tl.load(source + read, mask=mask, other=0)
            # The next tiles are looked up while these travel.
            next_start = _place(from_cells, tile + SPANS, tiles_in_cell, tiles_in_row, TILE, SPANS)
            if COPY:
                next_end = _place(to_cells, tile + SPANS, tiles_in_cell, tiles_in_row, TILE, SPANS)
                written = row_destination + end[:, None] + lane
                written = tl.max_contiguous(tl.multiple_of(written, (1, 2)), (1, TILE))
                tl.store(destination + written, words, mask=mask)
                end = next_end
            if DIGEST:
                total += tl.where(mask, _terms(words, row_inside + start[:, None] + lane), 0)
            start = next_start
        if DIGEST:
            block = tl.load(grid + 3 * num_rows + row)
            tl.atomic_add(digests + block, tl.sum(tl.sum(total, 1), 0))


@dataclass(frozen=True, slots=True)
class Address:
    """Memory that this process's GPU can read, as int64 words, though torch knows no tensor of it."""

    pointer: int
    dtype: torch.dtype = torch.int64

    def data_ptr(self) -> int:
        return self.pointer


def launch_copy(
    source: Address,
    destination: Tensor,
    grid: CopyGrid,
    numbers: Tensor,
    digests: Tensor,
    *,
    num_programs: int,
    digest: bool,
) -> None:
    """Queue the copy on the current stream.

    `destination` is flat uint8; `numbers` is `grid.packed()` on the GPU; `digests` are `grid.num_blocks` zeros
    there, and stay zeros without `digest`.
    """
    assert grid.is_aligned, "spans must be aligned to 16 bytes"
    _launch(
        source,
        destination.view(torch.int64),
        numbers,
        digests,
        num_rows=len(grid.row_source),
        num_cells=len(grid.cell_source),
        cell_words=grid.length // WORD_BYTES,
        num_programs=num_programs,
        copy=True,
        digest=digest,
    )


def launch_digest(pool: Tensor, block_ids: Tensor) -> Tensor:
    """Digests of `[num_blocks, block_bytes]` uint8 blocks, queued on the current stream."""
    ids = block_ids.to(pool.device, torch.int64)
    count, block_words = len(ids), pool.shape[1] // WORD_BYTES
    zeros = torch.zeros_like(ids)
    slots = torch.arange(count, device=pool.device)
    numbers = torch.cat([ids * block_words, zeros, zeros, slots, zeros[:1], zeros[:1]])
    digests = torch.zeros(count, dtype=torch.int64, device=pool.device)
    words = pool.view(torch.int64)
    _launch(
        words,
        words,
        numbers,
        digests,
        num_rows=count,
        num_cells=1,
        cell_words=block_words,
        num_programs=_DIGEST_PROGRAMS,
        copy=False,
        digest=True,
    )
    return digests


def _launch(
    source: Any,
    destination: Any,
    numbers: Tensor,
    digests: Tensor,
    *,
    num_rows: int,
    num_cells: int,
    cell_words: int,
    num_programs: int,
    copy: bool,
    digest: bool,
) -> None:
    if num_rows == 0:
        return
    tile = min(_TILE_WORDS, cell_words & -cell_words)  # the largest power of two that divides a cell
    spans = _TILE_WORDS // tile
    tiles_in_cell = cell_words // tile
    bursts = -(-num_cells * tiles_in_cell // spans)  # of a row
    share = -(-num_rows * bursts // (num_programs * _SHARES_PER_PROGRAM))
    share = max(1, min(share, _MAX_SHARE_TILES, bursts))
    shares_in_row = -(-bursts // share)
    _move[(min(num_programs, num_rows * shares_in_row),)](
        source,
        destination,
        numbers,
        digests,
        num_rows,
        num_cells,
        tiles_in_cell,
        share * spans,
        shares_in_row,
        TILE=tile,
        SPANS=spans,
        COPY=copy,
        DIGEST=digest,
        num_warps=_NUM_WARPS,
    )
