"""The copy plan: which bytes of the owner's pool go where in the reader's pool.

Pure arithmetic over two `KvLayout`s and two block lists; it knows no addresses, no transports and no tickets.
A plan is a grid: each row is a run of tokens (where it lies in each pool), each cell a piece of every row
(where it lies inside a run's block), all cells are equally long. Between equal layouts a row is a block and
there is one cell; between layouts that hold other layers, KV heads or tokens per block a cell is as much of a
block as is contiguous on both sides. So a plan of 32k tokens is a few thousand numbers whatever the layouts.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver.owners import Part, require_compatible
from diptych.transceiver.spans import Int64s, Spans


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """For every row r and cell c, `length` bytes go from `row_source[r] + cell_source[c]` to
    `row_destination[r] + cell_destination[c]`.
    """

    positions: Int64s  # in the owner's list: the blocks that are read
    source_blocks: Int64s  # their ids
    destination_blocks: Int64s
    row_block: Int64s  # index into source_blocks
    row_source: Int64s
    row_destination: Int64s
    cell_source: Int64s
    cell_destination: Int64s
    length: int
    source_block_bytes: int
    destination_block_bytes: int

    @property
    def num_bytes(self) -> int:
        return len(self.row_source) * len(self.cell_source) * self.length

    @property
    def whole_blocks(self) -> bool:
        """Blocks arrive as they were, so that a destination block has the digest of its source."""
        return self.length == self.source_block_bytes == self.destination_block_bytes

    @property
    def complete(self) -> np.ndarray:
        """For each of `source_blocks`, whether the plan copies all its bytes: then its digest can be checked."""
        rows = np.bincount(self.row_block, minlength=len(self.source_blocks))
        complete: np.ndarray = rows * (len(self.cell_source) * self.length) == self.source_block_bytes
        return complete

    def spans(self) -> Spans:
        """Row after row, neighbours on both sides merged."""
        source = (self.row_source[:, None] + self.cell_source).reshape(-1)
        destination = (self.row_destination[:, None] + self.cell_destination).reshape(-1)
        return Spans(source, destination, np.full(len(source), self.length, np.int64)).merged()

    def pieces(self, max_bytes: int) -> Spans:
        """Spans of at most `max_bytes`; a block that arrives whole is never cut."""
        return self.spans().pieces(max_bytes, self.source_block_bytes if self.whole_blocks else 1)

    def require_within(self, *, source_blocks: int, destination_blocks: int) -> None:
        """Both pools are large enough; the sizes are in blocks."""
        for side, blocks, limit in (
            ("source", self.source_blocks, source_blocks),
            ("destination", self.destination_blocks, destination_blocks),
        ):
            if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < limit:
                raise TransferError(
                    f"{side} blocks {int(blocks.min())} to {int(blocks.max())} lie outside a pool of {limit}",
                    code="layout",
                )


def plan_copy(
    source: KvLayout,
    destination: KvLayout,
    source_blocks: Sequence[int],
    indices: Sequence[int],
    destination_blocks: Sequence[int],
    *,
    num_tokens: int,
    part: Part | None = None,
) -> CopyPlan:
    """`source_blocks` hold a sequence's `num_tokens` tokens from the first on; `destination_blocks[i]` is to
    hold the sequence's block number `indices[i]`, counted in blocks of the destination.

    `part` names the layers and heads to take; None: all that the destination holds.
    """
    equal = source == destination
    if not equal:
        require_compatible(source, destination)
    positions, targets = np.asarray(indices, np.int64), np.asarray(destination_blocks, np.int64)
    _check_lists(source, destination, len(source_blocks), positions, targets, num_tokens)
    blocks = np.asarray(source_blocks, np.int64)
    if part is None and equal:
        return _plan_whole(source.block_bytes, blocks, positions, targets)
    part = part or Part(0, destination.layers, destination.kv_heads)
    return _plan_cut(source, destination, blocks, positions, targets, num_tokens, part)


def _check_lists(
    source: KvLayout,
    destination: KvLayout,
    num_source: int,
    positions: Int64s,
    targets: Int64s,
    num_tokens: int,
) -> None:
    if len(positions) != len(targets):
        raise TransferError(
            f"{len(positions)} blocks cannot fill {len(targets)} destination blocks", code="layout"
        )
    if len(np.unique(targets)) != len(targets):
        raise TransferError("a destination block is named twice", code="layout")
    held = min(num_tokens, num_source * source.tokens_per_block)
    limit = -(-held // destination.tokens_per_block)
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < limit:
        raise TransferError(
            f"a source index lies outside the {limit} blocks that the ticket's {num_source} blocks fill",
            code="layout",
        )


def _plan_whole(block_bytes: int, blocks: Int64s, positions: Int64s, targets: Int64s) -> CopyPlan:
    source = blocks[positions]
    return CopyPlan(
        positions=positions,
        source_blocks=source,
        destination_blocks=targets,
        row_block=np.arange(len(source)),
        row_source=source * block_bytes,
        row_destination=targets * block_bytes,
        cell_source=np.zeros(1, np.int64),
        cell_destination=np.zeros(1, np.int64),
        length=block_bytes,
        source_block_bytes=block_bytes,
        destination_block_bytes=block_bytes,
    )


def _plan_cut(
    source: KvLayout,
    destination: KvLayout,
    blocks: Int64s,
    positions: Int64s,
    targets: Int64s,
    num_tokens: int,
    part: Part,
) -> CopyPlan:
    run = math.gcd(source.tokens_per_block, destination.tokens_per_block)
    token_bytes = source.head_dim * source.item_bytes
    per_target = destination.tokens_per_block // run
    inside = np.arange(per_target) * run
    first = (positions[:, None] * destination.tokens_per_block + inside).reshape(-1)
    target = np.repeat(targets * destination.block_bytes, per_target) + np.tile(
        inside * token_bytes, len(targets)
    )
    # The last block of a sequence need not be full on either side.
    there = first < min(num_tokens, len(blocks) * source.tokens_per_block)
    first, target = first[there], target[there]
    read, row_block = np.unique(first // source.tokens_per_block, return_inverse=True)
    from_source, to_destination, length = _cells(source, destination, part, run)
    return CopyPlan(
        positions=read,
        source_blocks=blocks[read],
        destination_blocks=targets,
        row_block=row_block.reshape(-1),
        row_source=blocks[read][row_block.reshape(-1)] * source.block_bytes
        + first % source.tokens_per_block * token_bytes,
        row_destination=target,
        cell_source=from_source,
        cell_destination=to_destination,
        length=length,
        source_block_bytes=source.block_bytes,
        destination_block_bytes=destination.block_bytes,
    )


@functools.lru_cache(maxsize=64)  # the same for every plan between two layouts
def _cells(source: KvLayout, destination: KvLayout, part: Part, run: int) -> tuple[Int64s, Int64s, int]:
    """Where the part's pieces lie inside a block of each side, and how long a piece is."""
    length = run * source.head_dim * source.item_bytes
    # Whole tiles of neighbouring heads lie side by side; with all heads, K and V and the layers do too.
    whole_tiles = run == source.tokens_per_block == destination.tokens_per_block
    all_heads = len(part.kv_heads) == source.num_kv_heads == destination.num_kv_heads
    if whole_tiles and all_heads:
        length *= len(part.layers) * 2 * len(part.kv_heads)
        layers, kinds, heads = part.layers[:1], range(1), part.kv_heads[:1]
    elif whole_tiles:
        length *= len(part.kv_heads)
        layers, kinds, heads = part.layers, range(2), part.kv_heads[:1]
    else:
        layers, kinds, heads = part.layers, range(2), part.kv_heads
    offsets = []
    for side in (source, destination):
        tile = side.tokens_per_block * side.head_dim * side.item_bytes
        layer = np.asarray(layers)[:, None, None] - side.first_layer
        head = np.asarray(heads)[None, None, :] - side.kv_heads.start
        tiles = (layer * 2 + np.asarray(kinds)[None, :, None]) * side.num_kv_heads + head
        offsets.append((tiles * tile).reshape(-1).astype(np.int64))
        offsets[-1].flags.writeable = False
    return offsets[0], offsets[1], length
