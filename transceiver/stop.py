"""When work in a background thread has to end: at a deadline, or when somebody aborts it.

Real time always: these bound waits on sockets and copies. Leases have their own clock.
"""

import threading
import time

from diptych.errors import TransferError


class Stop:
    # How long a wait that an abort cannot interrupt may last before it looks again.
    _SLICE_S = 0.1

    def __init__(self, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._aborted = threading.Event()

    @property
    def aborted(self) -> bool:
        return self._aborted.is_set()

    def abort(self) -> None:
        self._aborted.set()

    def remaining_s(self) -> float:
        return self._deadline - time.monotonic()

    def slice_s(self) -> float:
        return max(0.001, min(self._SLICE_S, self.remaining_s()))

    def check(self) -> None:
        if self._aborted.is_set():
            raise TransferError("the transfer was aborted", code="cancelled")
        if self.remaining_s() <= 0:
            raise TransferError("the transfer did not end before its deadline", code="deadline")
