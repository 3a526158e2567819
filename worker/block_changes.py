"""What entered and left the prefix cache since the last step, for routers that want to know.

Only the last thing that happened to a hash counts, so that the record never outgrows what a step can touch,
and its order does not matter. Exists only while somebody listens.
"""

from collections.abc import Iterable, Sequence

from diptych.block_hash import block_key, pack_keys
from diptych.wire import BlockChanges, StoredBlock


class ChangeRecorder:
    def __init__(self, known: Iterable[bytes], *, with_tokens: bool) -> None:
        """`known`: what is in the cache now; the first changes tell all of it."""
        self.with_tokens = with_tokens
        self._present: dict[bytes, bool] = dict.fromkeys(known, True)
        self._described: dict[bytes, StoredBlock] = {}
        self._reset = True

    def stored(self, block_hash: bytes) -> None:
        self._present[block_hash] = True

    def describe(self, block_hash: bytes, parent: bytes, token_ids: Sequence[int]) -> None:
        """What a stored block holds."""
        self._described[block_hash] = StoredBlock(
            block_key(block_hash), block_key(parent) if parent else None, list(token_ids)
        )

    def removed(self, block_hash: bytes) -> None:
        self._present[block_hash] = False
        self._described.pop(block_hash, None)

    def drain(self) -> BlockChanges | None:
        """The changes since the last call; None when there are none."""
        if not self._present and not self._reset:
            return None
        changes = BlockChanges(
            stored=pack_keys(block_key(block_hash) for block_hash, here in self._present.items() if here),
            removed=pack_keys(
                block_key(block_hash) for block_hash, here in self._present.items() if not here
            ),
            described=list(self._described.values()),
            reset=self._reset,
        )
        self._present.clear()
        self._described.clear()
        self._reset = False
        return changes
