"""The peers of one transport, by their descriptors: each is met once, and let go of when its owner is gone."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

P = TypeVar("P")


class Peers(Generic[P]):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[bytes, tuple[str, P]] = {}  # descriptor -> its owner's incarnation, peer

    def find(self, descriptor: bytes) -> P | None:
        with self._lock:
            known = self._known.get(descriptor)
        return None if known is None else known[1]

    def add(self, descriptor: bytes, incarnation: str, make: Callable[[], P]) -> P:
        """The known peer, or else the one that `make` makes while nobody else can."""
        with self._lock:
            known = self._known.get(descriptor)
            if known is None:
                known = self._known[descriptor] = (incarnation, make())
            return known[1]

    def forget(self, incarnation: str) -> list[P]:
        """What was known of that owner."""
        with self._lock:
            gone = [descriptor for descriptor, known in self._known.items() if known[0] == incarnation]
            return [self._known.pop(descriptor)[1] for descriptor in gone]

    def clear(self) -> list[P]:
        """All that was known."""
        with self._lock:
            known, self._known = self._known, {}
        return [peer for _, peer in known.values()]
