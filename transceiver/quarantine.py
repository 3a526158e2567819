"""Waits until copies that outlasted their fetch have let go of its destination. Knows nothing of fetches."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from diptych.transceiver.transport import Transfer

log = logging.getLogger(__name__)

_JOIN_S = 5.0


class Quarantine:
    """`ended` is told blocks that are nobody's destination any more, on a background thread."""

    def __init__(self, ended: Callable[[tuple[int, ...]], None]) -> None:
        self._ended = ended
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def hold(self, blocks: tuple[int, ...], lingering: Sequence[Transfer], patience_s: float) -> None:
        """`patience_s`: for all of them together. Rare, and each wait is long: a thread for each."""
        thread = threading.Thread(
            target=self._settle, args=(blocks, lingering, patience_s), name="kv-quarantine", daemon=True
        )
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()] + [thread]
            thread.start()

    def close(self) -> None:
        """After the transports: their end ends every wait."""
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _settle(self, blocks: tuple[int, ...], lingering: Sequence[Transfer], patience_s: float) -> None:
        log.warning(
            "%d KV blocks are set aside until a copy that was given up has let go of them", len(blocks)
        )
        until = time.monotonic() + patience_s
        for transfer in lingering:
            transfer.settle(max(0.0, until - time.monotonic()))
        log.info("%d KV blocks that were set aside are free again", len(blocks))
        self._ended(blocks)
