"""Notices a step loop that no longer turns: a GPU that hangs, a rank that waits for another one, a stopped process.

Asks the engine whether it is there, one question at a time; the loop answers in its next turn. Knows nothing of steps,
and does not tell a long one from one that never ends.
"""

import asyncio
import time
from collections.abc import Callable

_INTERVAL_S = 1.0


class Pulse:
    def __init__(self, ask: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._asked_at: float | None = None  # of the question without an answer

    @property
    def silent_s(self) -> float:
        """For how long the loop owes an answer."""
        return 0.0 if self._asked_at is None else self._clock() - self._asked_at

    def answered(self) -> None:
        self._asked_at = None

    def beat(self) -> None:
        if self._asked_at is None:
            self._asked_at = self._clock()
            self._ask()

    async def run(self, limit_s: float) -> float:
        """Until an answer is owed for longer than `limit_s`; for how long."""
        while self.silent_s <= limit_s:
            self.beat()
            await asyncio.sleep(min(_INTERVAL_S, limit_s))
        return self.silent_s
