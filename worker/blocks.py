"""Who owns which KV block: allocation, prefix reuse, leases, eviction.

Pure bookkeeping over block ids; it never touches the memory behind them. The scheduler is its only caller.

    free    nobody needs it
    cached  nobody uses it, but its content is known by hash and may be matched; evicted oldest first
    active  at least one sequence refers to it
    leased  only a ticket holds it: a peer may be reading it; or a copy that was given up may still write it

    free + cached + active + leased = total, always (`BlockPool.check`)

Every block has a generation number that grows when the block is given to a new owner, so that a late reader of the
old content can tell.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from diptych.worker.block_changes import ChangeRecorder


class Generations(Protocol):
    """Integers by index: a list, or an array in shared memory."""

    def __getitem__(self, index: int, /) -> Any: ...
    def __setitem__(self, index: int, value: Any, /) -> None: ...


class BlockCounts(msgspec.Struct, frozen=True):
    free: int
    cached: int
    active: int
    leased: int
    total: int


class BlockPool:
    def __init__(
        self,
        num_blocks: int,
        *,
        reuse: bool = True,
        generations: Generations | None = None,
    ) -> None:
        """`generations`: where the generation numbers live, shared memory if peers are to see them."""
        self.num_blocks = num_blocks
        self.generations: Generations = [0] * num_blocks if generations is None else generations
        self._reuse = reuse
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._refs = [0] * num_blocks
        self._lease_refs = [0] * num_blocks
        self._num_active = 0
        self._num_leased = 0
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._recorder: ChangeRecorder | None = None

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def reuses(self) -> bool:
        """Whether what is published can be matched."""
        return self._reuse

    def is_active(self, block: int) -> bool:
        return self._refs[block] > 0

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix. They are not taken yet: call `take` before anything else."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    @property
    def recorder(self) -> ChangeRecorder | None:
        """Present while somebody wants to know what enters and leaves the cache."""
        return self._recorder

    def record_changes(self, *, with_tokens: bool) -> None:
        self._recorder = ChangeRecorder(self._block_of, with_tokens=with_tokens)

    def stop_recording(self) -> None:
        self._recorder = None

    def take(self, blocks: Iterable[int]) -> None:
        """Add one reference to each."""
        for block in blocks:
            if self._refs[block] == 0:
                if self._lease_refs[block]:
                    self._num_leased -= 1
                else:
                    del self._cached[block]
                self._num_active += 1
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of unknown content, one reference each; None, and nothing changed, if there are too few."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._refs[block] = 1
            self.generations[block] += 1
            blocks.append(block)
        self._num_active += count
        return blocks

    def publish(self, block: int, block_hash: bytes) -> bool:
        """Make a full, computed block known by its hash, unless one with the same content is known already."""
        if not self._reuse or block in self._hash_of or block_hash in self._block_of:
            return False
        self._hash_of[block] = block_hash
        self._block_of[block_hash] = block
        if self._recorder is not None:
            self._recorder.stored(block_hash)
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each. The last blocks of a prefix become the first to be evicted."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._num_active -= 1
                if self._lease_refs[block]:
                    self._num_leased += 1
                else:
                    self._retire(block)

    def lease(self, blocks: Iterable[int]) -> None:
        """Hold active blocks for a ticket, beyond the life of their sequence."""
        for block in blocks:
            self._lease_refs[block] += 1

    def unlease(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._lease_refs[block] -= 1
            if self._lease_refs[block] == 0 and self._refs[block] == 0:
                self._num_leased -= 1
                self._retire(block)

    def counts(self) -> BlockCounts:
        return BlockCounts(
            free=len(self._free),
            cached=len(self._cached),
            active=self._num_active,
            leased=self._num_leased,
            total=self.num_blocks,
        )

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one state."""
        counts = self.counts()
        assert counts.free + counts.cached + counts.active + counts.leased == counts.total, counts
        active = {block for block, refs in enumerate(self._refs) if refs}
        leased = {block for block, refs in enumerate(self._lease_refs) if refs} - active
        free, cached = set(self._free), set(self._cached)
        assert min(self._refs) >= 0 and min(self._lease_refs) >= 0, "a block was returned twice"
        assert len(active) == counts.active and len(leased) == counts.leased, counts
        assert len(free) == counts.free and not free & cached and not (free | cached) & (active | leased)
        assert cached <= self._hash_of.keys() and not free & self._hash_of.keys()
        assert {block: block_hash for block_hash, block in self._block_of.items()} == self._hash_of

    def _retire(self, block: int) -> None:
        if block in self._hash_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        if self._recorder is not None:
            self._recorder.removed(block_hash)
