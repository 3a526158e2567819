"""Copies a grid of equal spans from one block pool to another, and digests source blocks on the way.

Row r and cell c of the grid: `length` bytes from `rows[0][r] + cell_source[c]` to `rows[1][r] +
cell_destination[c]`. `copy_reference` is plain torch between tensors of one device; block_copy_triton.py is
the kernel, whose source may be any address that its GPU can read: a peer's memory, opened through CUDA IPC.
Knows nothing of KV layouts.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diptych.kernels.block_digest import WORD_BYTES, word_terms

ALIGN_BYTES = 16  # of all offsets, lengths and base addresses: the widest load
MAX_TILE_WORDS = 4096  # the kernel's burst

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CopyGrid:
    """Offsets in bytes. Made by `of`."""

    rows: Int64s  # [4, rows]: where it starts in the source pool, in the other, and in its block; the block's number
    tiles: Int64s  # of one row, for the kernel: where it is read (low half) and written (high half), in words
    tile_words: int
    cell_source: Int64s
    cell_destination: Int64s
    length: int
    num_blocks: int  # that rows belong to, numbered from 0

    @classmethod
    def of(
        cls, rows: Int64s, cell_source: Int64s, cell_destination: Int64s, length: int, num_blocks: int
    ) -> "CopyGrid":
        tile_words = largest_tile(length // WORD_BYTES)
        tiles = _tiles(cell_source.tobytes(), cell_destination.tobytes(), length // WORD_BYTES, tile_words)
        return cls(rows, tiles, tile_words, cell_source, cell_destination, length, num_blocks)

    @property
    def is_aligned(self) -> bool:
        together = self.length
        for offsets in (self.rows[:3], self.cell_source, self.cell_destination):
            together |= int(np.bitwise_or.reduce(offsets, axis=None))
        return not together % ALIGN_BYTES

    @property
    def num_bytes(self) -> int:
        return int(self.rows.shape[1]) * len(self.cell_source) * self.length

    @property
    def num_numbers(self) -> int:
        return self.rows.size + len(self.tiles)

    def pack_into(self, numbers: Int64s) -> None:
        """What the kernel reads."""
        numbers[: self.rows.size] = self.rows.reshape(-1)
        numbers[self.rows.size :] = self.tiles


def largest_tile(num_words: int) -> int:
    """What the kernel moves in one piece: the largest power of two that divides a cell."""
    return min(MAX_TILE_WORDS, num_words & -num_words)


@functools.lru_cache(maxsize=64)  # the same for every copy between two layouts
def _tiles(source: bytes, destination: bytes, num_words: int, tile_words: int) -> Int64s:
    inside = np.arange(0, num_words, tile_words)
    there, here = (np.frombuffer(cells, np.int64)[:, None] // WORD_BYTES for cells in (source, destination))
    tiles: Int64s = (there + inside | (here + inside) << 32).reshape(-1)
    tiles.flags.writeable = False
    return tiles


def copy_reference(source: Tensor, destination: Tensor, grid: CopyGrid) -> Tensor:
    """Between flat uint8 tensors. Returns `[num_blocks]` int64: digests of the source blocks over what is
    copied of them.
    """
    digests = torch.zeros(grid.num_blocks, dtype=torch.int64, device=source.device)
    count = torch.arange(grid.length // WORD_BYTES, device=source.device)
    for row_source, row_destination, row_inside, block in grid.rows.T.tolist():
        for from_cell, to_cell in zip(grid.cell_source.tolist(), grid.cell_destination.tolist(), strict=True):
            start, end = row_source + from_cell, row_destination + to_cell
            inside = (row_inside + from_cell) // WORD_BYTES
            span = source[start : start + grid.length]
            destination[end : end + grid.length] = span
            digests[block] += word_terms(span.view(torch.int64), inside + count).sum()
    return digests
