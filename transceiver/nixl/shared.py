"""Something that several threads use and one retires: it is closed once, when the last of them has left."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diptych.errors import TransferError


class Shared:
    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close
        self._lock = threading.Lock()
        self._users = 1  # who will retire it
        self._retired = False
        self.closed = threading.Event()

    @property
    def retired(self) -> bool:
        return self._retired

    @contextmanager
    def use(self) -> Iterator[None]:
        with self._lock:
            if self._retired:
                raise TransferError("the owner was forgotten meanwhile", code="peer_gone")
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def retire(self) -> None:
        """Nobody new from now on. Again it does nothing."""
        with self._lock:
            if self._retired:
                return
            self._retired = True
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._close()
        self.closed.set()
