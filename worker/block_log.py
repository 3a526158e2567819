"""What is in the engine's prefix cache, and how it came to that: answers "what changed since position N".

Pure: changes in, events out. Positions grow by one with each change of the engine; the log keeps the latest
changes, and who asks for older ones, or for those of another epoch, gets all that is there instead.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from diptych.block_hash import pack_keys, unpack_keys
from diptych.wire import BlockChanges, KvEvents


@dataclass(frozen=True, slots=True)
class _Entry:
    stored: tuple[int, ...]
    removed: tuple[int, ...]
    at: float

    @property
    def size(self) -> int:
        return len(self.stored) + len(self.removed)


class BlockLog:
    def __init__(self, epoch: str, *, max_keys: int = 1 << 18) -> None:
        """`max_keys`: how many stored and removed blocks the log remembers."""
        self._epoch = epoch
        self._max_keys = max_keys
        self._present: set[int] = set()
        self._entries: deque[_Entry] = deque()
        self._num_keys = 0
        self.last = 0  # position of the latest change

    def __len__(self) -> int:
        return len(self._present)

    def apply(self, changes: BlockChanges, now: float) -> None:
        entry = _Entry(tuple(unpack_keys(changes.stored)), tuple(unpack_keys(changes.removed)), now)
        self.last += 1
        if changes.reset:
            self._present = set(entry.stored)
            self._entries.clear()
            self._num_keys = 0
            return
        self._present.difference_update(entry.removed)
        self._present.update(entry.stored)
        self._entries.append(entry)
        self._num_keys += entry.size
        while self._num_keys > self._max_keys:
            self._num_keys -= self._entries.popleft().size

    def since(self, epoch: str | None, position: int, now: float) -> KvEvents | None:
        """What the reader does not know yet; None: it knows everything."""
        behind = self.last - position
        if epoch == self._epoch and behind == 0:
            return None
        if epoch != self._epoch or not 0 < behind <= len(self._entries):
            changes = BlockChanges(stored=pack_keys(self._present), reset=True)
            return KvEvents(epoch=self._epoch, last=self.last, changes=changes)
        entries = [self._entries[index] for index in range(-behind, 0)]
        return KvEvents(
            epoch=self._epoch, last=self.last, changes=_merged(entries), age_s=now - entries[0].at
        )

    def nothing_new(self) -> KvEvents:
        return KvEvents(epoch=self._epoch, last=self.last)


def _merged(entries: Iterable[_Entry]) -> BlockChanges:
    """Only the last thing that happened to a block counts."""
    here: dict[int, bool] = {}
    for entry in entries:
        here.update(dict.fromkeys(entry.removed, False))
        here.update(dict.fromkeys(entry.stored, True))
    return BlockChanges(
        stored=pack_keys(key for key, present in here.items() if present),
        removed=pack_keys(key for key, present in here.items() if not present),
    )
