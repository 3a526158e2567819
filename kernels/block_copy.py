"""Copies a grid of equal spans from one block pool to another, and digests source blocks on the way.

Row r and cell c of the grid: `length` bytes from `row_source[r] + cell_source[c]` to `row_destination[r] +
cell_destination[c]`. `copy_reference` is plain torch between tensors of one device; block_copy_triton.py is
the kernel, whose source may be any address that its GPU can read: a peer's memory, opened through CUDA IPC.
Knows nothing of KV layouts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diptych.kernels.block_digest import WORD_BYTES, word_terms

ALIGN_BYTES = 16  # of all offsets, lengths and base addresses: the widest load

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CopyGrid:
    """Offsets in bytes from the start of each pool. `row_block` numbers the source blocks that rows belong to,
    0 to `num_blocks` - 1; `row_inside` is where a row starts in its block.
    """

    row_source: Int64s
    row_destination: Int64s
    row_inside: Int64s
    row_block: Int64s
    cell_source: Int64s
    cell_destination: Int64s
    length: int
    num_blocks: int

    @property
    def is_aligned(self) -> bool:
        together = self.length
        for offsets in (*self._rows, *self._cells):
            together |= int(np.bitwise_or.reduce(offsets))
        return not together % ALIGN_BYTES

    @property
    def num_bytes(self) -> int:
        return len(self.row_source) * len(self.cell_source) * self.length

    @property
    def num_numbers(self) -> int:
        return 4 * len(self.row_source) + 2 * len(self.cell_source)

    def pack_into(self, numbers: Int64s) -> None:
        """What the kernel reads, offsets in words: four numbers for each row, then two for each cell."""
        rows, cells = len(self.row_source), len(self.cell_source)
        by_row = numbers[: 4 * rows].reshape(4, rows)
        for place, offsets in zip(by_row, self._rows, strict=False):
            np.floor_divide(offsets, WORD_BYTES, out=place)
        by_row[3] = self.row_block
        by_cell = numbers[4 * rows : self.num_numbers].reshape(2, cells)
        for place, offsets in zip(by_cell, self._cells, strict=True):
            np.floor_divide(offsets, WORD_BYTES, out=place)

    @property
    def _rows(self) -> tuple[Int64s, Int64s, Int64s]:
        return self.row_source, self.row_destination, self.row_inside

    @property
    def _cells(self) -> tuple[Int64s, Int64s]:
        return self.cell_source, self.cell_destination


def copy_reference(source: Tensor, destination: Tensor, grid: CopyGrid) -> Tensor:
    """Between flat uint8 tensors. Returns `[num_blocks]` int64: digests of the source blocks over what is
    copied of them.
    """
    digests = torch.zeros(grid.num_blocks, dtype=torch.int64, device=source.device)
    count = torch.arange(grid.length // WORD_BYTES, device=source.device)
    for row, block in enumerate(grid.row_block.tolist()):
        for cell in range(len(grid.cell_source)):
            start = int(grid.row_source[row] + grid.cell_source[cell])
            end = int(grid.row_destination[row] + grid.cell_destination[cell])
            inside = int(grid.row_inside[row] + grid.cell_source[cell]) // WORD_BYTES
            span = source[start : start + grid.length]
            destination[end : end + grid.length] = span
            digests[block] += word_terms(span.view(torch.int64), inside + count).sum()
    return digests
