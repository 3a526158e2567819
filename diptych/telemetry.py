"""Where a request's time goes.

A timeline is a chain of marks: each stage begins where the one before it ended, so the stages sum to the whole by
construction.
"""

import time
from collections.abc import Callable


class Timeline:
    """The stages of one request here, in seconds, from its arrival to its first token."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.started = clock()
        self._last = self.started
        self.stages: list[tuple[str, float]] = []

    @property
    def total_s(self) -> float:
        return self._last - self.started

    def mark(self, stage: str) -> None:
        """End `stage` now."""
        now = self._clock()
        self.stages.append((stage, now - self._last))
        self._last = now

    def mark_split(self, parts: list[tuple[str, float]], rest: str) -> None:
        """End several stages now, whose lengths another process measured; `rest` is the time they leave over."""
        now = self._clock()
        rest_s = now - self._last - sum(seconds for _, seconds in parts)
        self.stages += [*parts, (rest, rest_s)]
        self._last = now

    def server_timing(self, prefix: str = "") -> str:
        """The stages as a Server-Timing header, in milliseconds."""
        return ", ".join(f"{prefix}{stage};dur={seconds * 1000:.3f}" for stage, seconds in self.stages)
