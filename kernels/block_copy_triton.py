"""Triton kernels of block_copy.py and block_digest.py; see there for what they compute.

One kernel, and as many programs as the caller allows: each takes one share of a row after the other, as long as
there are any. A share is moved in bursts of 32 KiB, of one tile or of several, and each burst is asked for before
the one before it has come: so few programs keep a whole link busy, and the rest of the GPU goes on computing.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.block_copy import MAX_TILE_WORDS, CopyGrid, largest_tile
from diptych.kernels.block_digest import KEY_MULTIPLIERS, WORD_BYTES

_NUM_WARPS = 16
_SHARES_PER_PROGRAM = 8  # enough that no program waits long for the last ones
_MAX_SHARE_BURSTS = 8
_DIGEST_PROGRAMS = 264
_NUM_POINTERS, _NUM_SIZES = 5, 4  # the kernel's parameters
_SCRATCH_POINTERS = 2  # that Triton appends to them

_LOW = tl.constexpr(0xFFFFFFFF)
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
def _places(row, starts, TILE: tl.constexpr):
    """Of all words of tiles that start there, which are multiples of 16 bytes."""
    places = row + starts[:, None] + tl.arange(0, TILE)[None, :]
    return tl.max_contiguous(tl.multiple_of(places, (1, 2)), (1, TILE))


# Not specialised: each kind of value would be compiled anew, in the middle of a transfer.
@triton.jit(
    do_not_specialize=["num_rows", "tiles_in_row", "tiles_in_share", "shares_in_row"],
    do_not_specialize_on_alignment=["taken"],
)
def _move(
    source,
    destination,
    grid,
    digests,
    taken,  # a zero: how many shares were taken beyond each program's first
    num_rows,
    tiles_in_row,
    tiles_in_share,
    shares_in_row,
    TILE: tl.constexpr,  # words that are contiguous on both sides
    SPANS: tl.constexpr,  # such tiles in one burst
    COPY: tl.constexpr,
    DIGEST: tl.constexpr,
):
    share = tl.program_id(0)
    while share < num_rows * shares_in_row:
        row = share // shares_in_row
        first = (share % shares_in_row) * tiles_in_share
        count = min(tiles_in_share, tiles_in_row - first)
        row_source = tl.load(grid + row) >> 3  # bytes to words
        row_destination = tl.load(grid + num_rows + row) >> 3
        row_inside = tl.load(grid + 2 * num_rows + row) >> 3
        table = grid + 4 * num_rows + first
        total = tl.zeros([SPANS, TILE], tl.int64)
        number = tl.arange(0, SPANS)
        tiles = tl.load(table + number, mask=number < count, other=0)
        read = source + _places(row_source, tiles & _LOW, TILE)
        words = tl.load(read, mask=(number < count)[:, None], other=0)
        next_tiles = tl.load(table + number + SPANS, mask=number + SPANS < count, other=0)
        # Not every program is as near to the link as the others: who is done first takes the next.
        share = tl.num_programs(0) + tl.atomic_add(taken, 1).to(tl.int32)
        for burst in range(0, count, SPANS):
            # While these words travel the next ones set out, and the places of those after them are looked up.
            number = burst + tl.arange(0, SPANS)
            read = source + _places(row_source, next_tiles & _LOW, TILE)
            next_words = tl.load(read, mask=(number + SPANS < count)[:, None], other=0)
            later_tiles = tl.load(table + number + 2 * SPANS, mask=number + 2 * SPANS < count, other=0)
            within = (number < count)[:, None]
            if COPY:
                tl.store(destination + _places(row_destination, tiles >> 32, TILE), words, mask=within)
            if DIGEST:
                terms = _terms(words, _places(row_inside, tiles & _LOW, TILE))
                total += tl.where(within, terms, 0)
            tiles, next_tiles, words = next_tiles, later_tiles, next_words
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
        self._start = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
        self._start.argtypes = (ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
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

        `numbers` is what `grid.pack_into` wrote, on the GPU; `digests` are `grid.num_blocks` zeros there, which
        stay zeros without `digest`, and one more.
        """
        shape = _Shape.of(grid.rows.shape[1], len(grid.tiles), grid.tile_words, num_programs)
        if shape.num_programs == 0:
            return
        variant = (shape.tile, digest)
        compiled = self._compiled.get(variant)
        pointers = (source, destination, numbers, digests, digests + WORD_BYTES * grid.num_blocks)
        if compiled is None:
            with torch.cuda.stream(stream):
                kernel = shape.launch(*map(Address, pointers), copy=True, digest=digest)
            self._compiled[variant] = _Compiled(
                kernel.function,
                kernel.metadata.num_warps,
                kernel.metadata.shared,
                _Arguments(),
            )
            return
        self._launch(compiled, pointers, shape, stream.cuda_stream)

    def _launch(self, compiled: "_Compiled", pointers: tuple[int, ...], shape: "_Shape", stream: int) -> None:
        compiled.arguments.set(*pointers, *shape.numbers)
        threads = 32 * compiled.num_warps
        code = self._start(
            *(compiled.function, shape.num_programs, 1, 1, threads, 1, 1, compiled.shared_bytes, stream),
            *(compiled.arguments.addresses, None),
        )
        if code:
            raise RuntimeError(f"the copy kernel could not be launched: CUDA error {code}")


class _Arguments:
    """The kernel's parameters, as the driver takes them."""

    def __init__(self) -> None:
        kinds = [ctypes.c_uint64] * _NUM_POINTERS + [ctypes.c_int32] * _NUM_SIZES
        self._values = [kind() for kind in kinds]
        scratch = [ctypes.c_uint64() for _ in range(_SCRATCH_POINTERS)]
        self._all = [*self._values, *scratch]
        self.addresses = (ctypes.c_void_p * len(self._all))(*map(ctypes.addressof, self._all))

    def set(self, *values: int) -> None:
        for place, value in zip(self._values, values, strict=True):
            place.value = value


@dataclass(frozen=True, slots=True)
class _Compiled:
    function: int
    num_warps: int
    shared_bytes: int
    arguments: _Arguments


def launch_digest(pool: Tensor, block_ids: Tensor) -> Tensor:
    """Digests of `[num_blocks, block_bytes]` uint8 blocks, queued on the current stream."""
    ids = block_ids.to(pool.device, torch.int64)
    count, block_words = len(ids), pool.shape[1] // WORD_BYTES
    zeros = torch.zeros_like(ids)
    slots = torch.arange(count, device=pool.device)
    tile = largest_tile(block_words)
    tiles = torch.arange(0, block_words, tile, device=pool.device)
    numbers = torch.cat([ids * pool.shape[1], zeros, zeros, slots, tiles])
    digests = torch.zeros(count + 1, dtype=torch.int64, device=pool.device)
    words = pool.view(torch.int64)
    shape = _Shape.of(count, len(tiles), tile, _DIGEST_PROGRAMS)
    if shape.num_programs:
        shape.launch(words, words, numbers, digests, digests[count:], copy=False, digest=True)
    return digests[:count]


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a grid is shared out among programs."""

    num_programs: int
    tile: int  # words
    numbers: tuple[int, int, int, int]  # the kernel's, from num_rows on

    @classmethod
    def of(cls, num_rows: int, tiles_in_row: int, tile: int, num_programs: int) -> "_Shape":
        spans = MAX_TILE_WORDS // tile
        bursts = -(-tiles_in_row // spans)  # of a row
        share = -(-num_rows * bursts // (num_programs * _SHARES_PER_PROGRAM))
        share = max(1, min(share, _MAX_SHARE_BURSTS, bursts))
        shares_in_row = -(-bursts // share)
        return cls(
            min(num_programs, num_rows * shares_in_row),
            tile,
            (num_rows, tiles_in_row, share * spans, shares_in_row),
        )

    def launch(
        self,
        source: Any,
        destination: Any,
        numbers: Any,
        digests: Any,
        taken: Any,
        *,
        copy: bool,
        digest: bool,
    ) -> Any:
        """With Triton, on the current stream; the compiled kernel."""
        return _move[(self.num_programs,)](
            source,
            destination,
            numbers,
            digests,
            taken,
            *self.numbers,
            TILE=self.tile,
            SPANS=MAX_TILE_WORDS // self.tile,
            COPY=copy,
            DIGEST=digest,
            num_warps=_NUM_WARPS,
        )
