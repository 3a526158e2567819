"""Runs fetches on background threads: at most so many, and at most so many tokens, at a time; first come first.

One fetch that is larger than the limit runs alone: how much is on its way at once is bounded, not how long a
prompt may be. Knows nothing of what a fetch does.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Entry:
    num_tokens: int
    work: Callable[[], None]
    future: "Future[None]"


class FetchQueue:
    def __init__(self, num_threads: int, max_tokens: int | None) -> None:
        """`max_tokens`: None is any number."""
        self._num_threads = num_threads
        self._max_tokens = max_tokens
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-fetch")
        self._changed = threading.Condition()
        self._waiting: deque[_Entry] = deque()
        self._num_running = 0
        self._tokens_running = 0

    def submit(self, num_tokens: int, work: Callable[[], None]) -> "Future[None]":
        """`work` must not raise. The future can be cancelled until it begins."""
        entry = _Entry(num_tokens, work, Future())
        with self._changed:
            self._waiting.append(entry)
            self._start_next()
        return entry.future

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Waits until all work is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._num_running)
        self._executor.shutdown(wait=True)

    def _start_next(self) -> None:
        while self._waiting:
            entry = self._waiting[0]
            if not entry.future.cancelled() and not self._fits(entry):
                return
            self._waiting.popleft()
            if entry.future.set_running_or_notify_cancel():
                self._num_running += 1
                self._tokens_running += entry.num_tokens
                self._executor.submit(self._run, entry)

    def _fits(self, entry: _Entry) -> bool:
        if self._num_running == 0 or self._max_tokens is None:
            return self._num_running < self._num_threads
        fits = self._tokens_running + entry.num_tokens <= self._max_tokens
        return fits and self._num_running < self._num_threads

    def _run(self, entry: _Entry) -> None:
        try:
            entry.work()
        finally:
            entry.future.set_result(None)
            with self._changed:
                self._num_running -= 1
                self._tokens_running -= entry.num_tokens
                self._start_next()
                self._changed.notify_all()
