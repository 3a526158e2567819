"""How many requests run at once, who waits, and who is told at once that it is of no use to wait.

The predicted wait of a request is its place in the line times the time between two places that become free:
the usual duration of a request over how many run (Little's law, which holds whenever there is a line). A request
whose wait and duration do not fit its deadline is refused with 429 and the time after which to come back: when it
comes, and again when its turn comes, so that no worker computes what nobody will wait for.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from diptych.errors import Overloaded
from diptych.router.api_keys import ApiKey
from diptych.router.fair_queue import FairQueue

_LEAST_WEIGHT = 0.02  # of one duration in the average, however many run
_DEVIATIONS = 2.0  # that a request may take longer than usual


@dataclass(eq=False, slots=True)
class _Turn:
    """One request in the line."""

    deadline: float
    came: asyncio.Future[None]


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
        self._line: FairQueue[_Turn] = FairQueue(max_waiting)
        self._usual_s: float | None = None  # duration of a request; None: none has ended yet
        self._deviation_s = 0.0
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
        if wait_s + self._needed_s > left_s:
            raise self._refuse(
                f"The wait would be {wait_s:.1f} s, the deadline is in {max(0.0, left_s):.1f} s", wait_s
            )
        turn = _Turn(deadline, asyncio.get_running_loop().create_future())
        dropped = self._line.push(key.name, key.weight, turn)
        if dropped is turn:
            raise self._refuse(f"{self.waiting} requests wait already", wait_s)
        if dropped is not None and not dropped.came.done():
            refusal = self._refuse("The line is full, and this key has the most of it", wait_s)
            dropped.came.set_exception(refusal)
        self._admit()
        await self._wait_for(turn, key, left_s)

    def leave(self, took_s: float, *, is_whole: bool) -> None:
        """How long the request ran; one that was broken off counts only when that is long already."""
        self.running -= 1
        if self._usual_s is None:
            if is_whole:
                self._usual_s = took_s
        elif is_whole or took_s > self._usual_s:
            weight = max(_LEAST_WEIGHT, 1 / max(1, self._limit()))
            difference_s = took_s - self._usual_s
            self._usual_s += weight * difference_s
            self._deviation_s += weight * (abs(difference_s) - self._deviation_s)
        self._admit()

    def _admit(self) -> None:
        while self._line and self.running < self._limit():
            turn = self._line.pop()
            if turn.came.done():
                continue
            left_s = turn.deadline - self._clock()
            if self._needed_s > left_s:
                reason = (
                    f"A request takes {self._needed_s:.1f} s, and the deadline is in {max(0.0, left_s):.1f} s"
                )
                turn.came.set_exception(self._refuse(reason, self._wait_s(self.waiting)))
            else:
                self.running += 1
                turn.came.set_result(None)

    async def _wait_for(self, turn: _Turn, key: ApiKey, left_s: float) -> None:
        try:
            await asyncio.wait((turn.came,), timeout=left_s)
        except asyncio.CancelledError:
            self._give_up(turn, key)
            raise
        if not turn.came.done():
            self._give_up(turn, key)
            raise self._refuse("The deadline passed while the request waited", self._wait_s(self.waiting))
        turn.came.result()

    def _give_up(self, turn: _Turn, key: ApiKey) -> None:
        if turn.came.done() and turn.came.exception() is None:
            self.leave(0.0, is_whole=False)  # its turn came in the same moment
        else:
            turn.came.cancel()
            self._line.remove(key.name, turn)

    @property
    def _needed_s(self) -> float:
        """How long a request may well take."""
        return 0.0 if self._usual_s is None else self._usual_s + _DEVIATIONS * self._deviation_s

    def _wait_s(self, ahead: int) -> float:
        if self._usual_s is None:
            return 0.0
        return (ahead + 1) * self._usual_s / max(1, self._limit())

    def _refuse(self, reason: str, wait_s: float) -> Overloaded:
        self.refused += 1
        return Overloaded(f"The server is overloaded: {reason}.", retry_after_s=max(1.0, wait_s))
