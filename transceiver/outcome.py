"""What every transfer tells of itself (see `Transfer` in transport.py), and how it is aborted."""

import numpy as np

from diptych.transceiver.pool import Digests, Generations
from diptych.transceiver.stop import Stop
from diptych.transceiver.transport import TransferState


class Outcome:
    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self.state = TransferState.RUNNING
        self.bytes = 0
        self.seconds = 0.0
        self.generations: Generations = np.empty(0, np.uint64)
        self.digests: Digests | None = None

    @property
    def lingers(self) -> bool:
        return False

    def settle(self, patience_s: float) -> None:
        """`wait` has let go of the destination, or this class is not the last word."""

    def abort(self) -> None:
        self._stop.abort()

    def _fail(self) -> None:
        """It has let go of the destination, and did not copy everything."""
        self.state = TransferState.ABORTED if self._stop.aborted else TransferState.FAILED
