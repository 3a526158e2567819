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
        offsets = (*self._rows, *self._cells)
        return not self.length % ALIGN_BYTES and not any(np.any(array % ALIGN_BYTES) for array in offsets)

    @property
    def num_bytes(self) -> int:
        return len(self.row_source) * len(self.cell_source) * self.length

    def packed(self) -> Int64s:
        """What the kernel reads, offsets in words: four numbers for each row, then two for each cell."""
        rows = [array // WORD_BYTES for array in self._rows]
        return np.concatenate([*rows, self.row_block, *(array // WORD_BYTES for array in self._cells)])

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
