"""How many requests run at once, who waits, and who is told at once that it is of no use to wait.

The predicted wait of a request is its place in the line times the time between two places that become free:
the usual duration of a request over how many run (Little's law, which holds whenever there is a line). A request
whose wait and duration do not fit its deadline is refused with 429 and the time after which to come back.
"""

import asyncio
import time
from collections.abc import Callable

from diptych.errors import Overloaded
from diptych.router.api_keys import ApiKey
from diptych.router.fair_queue import FairQueue

_LEAST_WEIGHT = 0.02  # of one duration in the average, however many run


class Admission:
    def __init__(
        self,
        limit: Callable[[], int],
        max_waiting: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: how many may run now; it changes when workers come and go."""
        self._limit = limit
        self._clock = clock
        self._line: FairQueue[asyncio.Future[None]] = FairQueue(max_waiting)
        self._usual_s: float | None = None  # duration of a request; None: none has ended yet
        self.running = 0
        self.refused = 0

    @property
    def waiting(self) -> int:
        return len(self._line)

    async def enter(self, key: ApiKey, deadline: float) -> None:
        """Returns when the request may run; then `leave` must be called. Raises Overloaded."""
        if self.running < self._limit() and not self._line:
            self.running += 1
            return
        ahead = self._line.ahead_of(key.name, key.weight)
        wait_s = self._wait_s(ahead)
        left_s = deadline - self._clock()
        if wait_s + (self._usual_s or 0.0) > left_s:
            raise self._refuse(
                f"The wait would be {wait_s:.1f} s, the deadline is in {max(0.0, left_s):.1f} s", wait_s
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        dropped = self._line.push(key.name, key.weight, turn)
        if dropped is turn:
            raise self._refuse(f"{self.waiting} requests wait already", wait_s)
        if dropped is not None and not dropped.done():
            dropped.set_exception(self._refuse("The line is full, and this key has the most of it", wait_s))
        self._admit()
        await self._wait_for(turn, key, left_s)

    def leave(self, took_s: float | None) -> None:
        """`took_s`: how long it ran; None when that says nothing about others, as after an error."""
        self.running -= 1
        if took_s is not None:
            if self._usual_s is None:
                self._usual_s = took_s
            else:
                weight = max(_LEAST_WEIGHT, 1 / max(1, self._limit()))
                self._usual_s += weight * (took_s - self._usual_s)
        self._admit()

    def _admit(self) -> None:
        while self._line and self.running < self._limit():
            turn = self._line.pop()
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    async def _wait_for(self, turn: "asyncio.Future[None]", key: ApiKey, left_s: float) -> None:
        try:
            await asyncio.wait((turn,), timeout=left_s)
        except asyncio.CancelledError:
            self._give_up(turn, key)
            raise
        if not turn.done():
            self._give_up(turn, key)
            raise self._refuse("The deadline passed while the request waited", self._wait_s(self.waiting))
        turn.result()

    def _give_up(self, turn: "asyncio.Future[None]", key: ApiKey) -> None:
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self.leave(None)  # its turn came in the same moment
        else:
            turn.cancel()
            self._line.remove(key.name, turn)

    def _wait_s(self, ahead: int) -> float:
        if self._usual_s is None:
            return 0.0
        return (ahead + 1) * self._usual_s / max(1, self._limit())

    def _refuse(self, reason: str, wait_s: float) -> Overloaded:
        self.refused += 1
        return Overloaded(f"The server is overloaded: {reason}.", retry_after_s=max(1.0, wait_s))
