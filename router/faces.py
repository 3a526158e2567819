"""All client connections of one router process: made for the listener, swept, drained. See face.py for one of them."""

import asyncio
import time
from collections.abc import Callable, Collection
from email.utils import formatdate

from diptych.router.face import Face, Serve

_SWEEP_S = 1.0
_LOOK_S = 0.02  # while draining


class Faces:
    """All connections of one process; use as a protocol factory for `create_server`."""

    def __init__(
        self,
        serve: Serve,
        paths: Collection[str],
        hand_over: Callable[[], asyncio.Protocol],
        *,
        max_body_bytes: int,
        body_s: float,
        keep_alive_s: float,
    ) -> None:
        """`hand_over` makes the protocol that takes what is not in `paths`; `body_s`: for a body to arrive."""
        self.serve = serve
        self.paths = frozenset(paths)
        self.hand_over = hand_over
        self.max_body_bytes = max_body_bytes
        self.body_s = body_s
        self.loop = asyncio.get_running_loop()
        self.is_draining = False
        self.open: set[Face] = set()
        self.date_line = _date_line()
        self._keep_alive_s = keep_alive_s
        self._sweeper = self.loop.create_task(self._sweep(), name="faces")

    def __call__(self) -> "Face":
        return Face(self)

    @property
    def num_running(self) -> int:
        return sum(face.is_busy for face in self.open)

    async def drain(self, timeout_s: float, *, keep_idle: bool) -> None:
        """The listener is closed already: the answer that each open connection gets yet is its last.

        `keep_idle`: keep an idle connection for as long as its client may believe that it can be used.
        """
        self.is_draining = True
        now = time.monotonic()
        until, idle_until = (
            now + timeout_s,
            now + (min(self._keep_alive_s, timeout_s / 2) if keep_idle else 0.0),
        )
        while self.open and time.monotonic() < until:
            if time.monotonic() >= idle_until:
                self._close_idle()
            await asyncio.sleep(_LOOK_S)

    async def close(self) -> None:
        self._sweeper.cancel()
        running = [face.task for face in self.open if face.task is not None]
        for face in [*self.open]:
            face.abort()
        await asyncio.gather(self._sweeper, *running, return_exceptions=True)

    def _close_idle(self) -> None:
        for face in [*self.open]:
            face.close_if_idle_since(float("inf"))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.date_line = _date_line()
            now = time.monotonic()
            for face in [*self.open]:
                face.close_if_idle_since(now - self._keep_alive_s)
                face.close_if_slow(now)


def _date_line() -> bytes:
    return f"Date: {formatdate(usegmt=True)}\r\n".encode()
