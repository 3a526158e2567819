"""A bounded waiting line that is fair between keys. Pure: no clock, no asyncio.

Start-time fair queueing: every entry gets a tag, the key's last tag (or now's) plus one over the key's weight;
the least tag is served first. So keys share by weight, in whatever numbers they come; within one key the order
is that of arrival. A full line drops the last entry of the key that takes the most of it for its weight.
"""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class _Line(Generic[T]):
    """The entries of one key."""

    __slots__ = ("entries", "last_tag", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.entries: deque[tuple[float, T]] = deque()
        self.last_tag = 0.0

    @property
    def share(self) -> float:
        return len(self.entries) / self.weight


class FairQueue(Generic[T]):
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lines: dict[str, _Line[T]] = {}  # of keys that have entries
        self._now = 0.0  # the tag of the last one served
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def ahead_of(self, key: str, weight: float) -> int:
        """How many would be served before an entry that came now."""
        line = self._lines.get(key)
        tag = max(self._now, line.last_tag if line else 0.0) + 1 / weight
        return sum(_served_before(other, tag) for other in self._lines.values())

    def push(self, key: str, weight: float, entry: T) -> T | None:
        """The entry that has to go because the line is full: this one, or another; None: there was room."""
        line = self._lines.get(key)
        dropped = None
        if self._length >= self._capacity:
            share = ((len(line.entries) if line else 0) + 1) / weight
            longest = max(self._lines, key=lambda key: self._lines[key].share, default=None)
            if longest is None or self._lines[longest].share <= share:
                return entry
            dropped = self._drop_last(longest)
        if line is None:
            line = self._lines[key] = _Line(weight)
        line.last_tag = max(self._now, line.last_tag) + 1 / weight
        line.entries.append((line.last_tag, entry))
        self._length += 1
        return dropped

    def pop(self) -> T:
        """The next one; there is at least one."""
        key, line = min(self._lines.items(), key=lambda item: item[1].entries[0][0])
        self._now, entry = line.entries.popleft()
        self._length -= 1
        if not line.entries:
            del self._lines[key]
        return entry

    def _drop_last(self, key: str) -> T:
        line = self._lines[key]
        _, entry = line.entries.pop()
        line.last_tag -= 1 / line.weight
        self._length -= 1
        if not line.entries:
            del self._lines[key]
        return entry

    def remove(self, key: str, entry: T) -> None:
        """One that no longer waits; one that is not there is ignored."""
        line = self._lines.get(key)
        if line is None:
            return
        kept = deque(item for item in line.entries if item[1] is not entry)
        self._length -= len(line.entries) - len(kept)
        line.entries = kept
        if not kept:
            del self._lines[key]


def _served_before(line: _Line[T], tag: float) -> int:
    """Tags of one line are 1 / weight apart, or more."""
    first = line.entries[0][0]
    if first > tag:
        return 0
    return min(len(line.entries), int((tag - first) * line.weight) + 1)
