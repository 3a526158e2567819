"""Triton kernels of block_copy.py and block_digest.py; see there for what they compute.

One kernel, and as many programs as the caller allows: each takes one share of a row after the other. A share
is cut into tiles of 32 KiB that are loaded in one burst, so that few programs keep a whole link busy: the rest
of the GPU goes on computing.
"""

import ctypes
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
_SCRATCH_POINTERS = 2  # that Triton appends to a kernel's parameters

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


class BlockMover:
    """Launches the copy kernel on one GPU. For one thread at a time.

    Triton's own launch takes longer than a small copy, so it does the first of each variant (and compiles it),
    and the driver the others.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._compiled: dict[tuple[int, bool], _Compiled] = {}

    def copy(
        self,
        source: int,
        destination: int,
        numbers: int,
        digests: int,
        grid: CopyGrid,
        *,
        num_programs: int,
        digest: bool,
        stream: torch.cuda.Stream,
    ) -> None:
        """Queue the copy on `stream`, whose context is current. All are addresses, aligned to 16 bytes.

        `numbers` is what `grid.pack_into` wrote, on the GPU; `digests` are `grid.num_blocks` zeros there, and
        stay zeros without `digest`.
        """
        shape = _Shape.of(
            len(grid.row_source), len(grid.cell_source), grid.length // WORD_BYTES, num_programs
        )
        if shape.num_programs == 0:
            return
        variant = (shape.tile, digest)
        compiled = self._compiled.get(variant)
        pointers = (source, destination, numbers, digests)
        if compiled is None:
            with torch.cuda.stream(stream):
                kernel = shape.launch(*map(Address, pointers), copy=True, digest=digest)
            self._compiled[variant] = _Compiled(
                ctypes.c_void_p(kernel.function), kernel.metadata.num_warps, kernel.metadata.shared
            )
            return
        self._launch(compiled, pointers, shape, stream.cuda_stream)

    def _launch(self, compiled: "_Compiled", pointers: tuple[int, ...], shape: "_Shape", stream: int) -> None:
        values = [
            *map(ctypes.c_uint64, pointers),
            *map(ctypes.c_int32, shape.numbers),
            *(ctypes.c_uint64(0) for _ in range(_SCRATCH_POINTERS)),
        ]
        parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        code = self._library.cuLaunchKernel(
            compiled.function,
            *(shape.num_programs, 1, 1),
            *(32 * compiled.num_warps, 1, 1),
            compiled.shared_bytes,
            ctypes.c_void_p(stream),
            parameters,
            None,
        )
        if code:
            raise RuntimeError(f"the copy kernel could not be launched: CUDA error {code}")


@dataclass(frozen=True, slots=True)
class _Compiled:
    function: ctypes.c_void_p
    num_warps: int
    shared_bytes: int


def launch_digest(pool: Tensor, block_ids: Tensor) -> Tensor:
    """Digests of `[num_blocks, block_bytes]` uint8 blocks, queued on the current stream."""
    ids = block_ids.to(pool.device, torch.int64)
    count, block_words = len(ids), pool.shape[1] // WORD_BYTES
    zeros = torch.zeros_like(ids)
    slots = torch.arange(count, device=pool.device)
    numbers = torch.cat([ids * block_words, zeros, zeros, slots, zeros[:1], zeros[:1]])
    digests = torch.zeros(count, dtype=torch.int64, device=pool.device)
    words = pool.view(torch.int64)
    shape = _Shape.of(count, 1, block_words, _DIGEST_PROGRAMS)
    if shape.num_programs:
        shape.launch(words, words, numbers, digests, copy=False, digest=True)
    return digests


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a grid is shared out among programs."""

    num_programs: int
    tile: int  # words
    numbers: tuple[int, int, int, int, int]  # the kernel's, from num_rows on

    @classmethod
    def of(cls, num_rows: int, num_cells: int, cell_words: int, num_programs: int) -> "_Shape":
        tile = min(_TILE_WORDS, cell_words & -cell_words)  # the largest power of two that divides a cell
        spans = _TILE_WORDS // tile
        tiles_in_cell = cell_words // tile
        bursts = -(-num_cells * tiles_in_cell // spans)  # of a row
        share = -(-num_rows * bursts // (num_programs * _SHARES_PER_PROGRAM))
        share = max(1, min(share, _MAX_SHARE_TILES, bursts))
        shares_in_row = -(-bursts // share)
        return cls(
            min(num_programs, num_rows * shares_in_row),
            tile,
            (num_rows, num_cells, tiles_in_cell, share * spans, shares_in_row),
        )

    def launch(
        self, source: Any, destination: Any, numbers: Any, digests: Any, *, copy: bool, digest: bool
    ) -> Any:
        """With Triton, on the current stream; the compiled kernel."""
        return _move[(self.num_programs,)](
            source,
            destination,
            numbers,
            digests,
            *self.numbers,
            TILE=self.tile,
            SPANS=_TILE_WORDS // self.tile,
            COPY=copy,
            DIGEST=digest,
            num_warps=_NUM_WARPS,
        )
