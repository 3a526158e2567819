"""What routers are told of the prefix cache: GET /kv_events for ours, POST /kv_cache_events as TensorRT-LLM.

The engine reports only while somebody listens: from the first GET on, until nobody has asked for a while; or
always, when `kv_cache_config.event_buffer_max_size` asks for TensorRT-LLM's events.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from diptych.block_hash import unpack_keys
from diptych.wire import BlockChanges, KvEvents
from diptych.worker.block_log import BlockLog

_FORGET_S = 60.0  # a listener that has not asked for so long is gone
_PRIORITY = 35  # TensorRT-LLM's default


class ChangeSource(Protocol):
    """The engine, as far as this is concerned."""

    on_blocks: Callable[[BlockChanges], None] | None

    def watch_blocks(self, *, enabled: bool, with_tokens: bool = False) -> None: ...


class KvEventFeed:
    def __init__(self, source: ChangeSource, epoch: str, buffer: "TrtBuffer | None" = None) -> None:
        """`buffer`: TensorRT-LLM's events, when they are wanted."""
        self._source = source
        self._log = BlockLog(epoch)
        self._buffer = buffer
        self._listening = False
        self._is_current = False  # the engine has said all that is in its cache
        self._closed = False
        self._heard_at = 0.0
        self._num_waiting = 0
        self._changed = asyncio.Event()
        source.on_blocks = self._take
        if self._buffer is not None:
            self._listen()

    async def since(self, epoch: str | None, position: int, wait_s: float) -> KvEvents:
        """What changed since `position` of `epoch`, as soon as something has."""
        deadline = time.monotonic() + wait_s
        self._heard_at = time.monotonic()
        self._listen()
        self._num_waiting += 1
        try:
            while not self._closed:
                changed = self._changed
                if self._is_current:
                    events = self._log.since(epoch, position, time.monotonic())
                    if events is not None:
                        return events
                try:
                    await asyncio.wait_for(changed.wait(), max(0.0, deadline - time.monotonic()))
                except asyncio.TimeoutError:
                    break
            return self._log.nothing_new()
        finally:
            self._num_waiting -= 1

    def drain_buffer(self) -> list[dict[str, Any]]:
        """TensorRT-LLM's events since the last call."""
        return [] if self._buffer is None else self._buffer.drain()

    def close(self) -> None:
        """Whoever waits is answered now."""
        self._closed = True
        self._changed.set()

    def _listen(self) -> None:
        if not self._listening:
            self._listening = True
            self._is_current = False
            self._source.watch_blocks(enabled=True, with_tokens=self._buffer is not None)

    def _take(self, changes: BlockChanges) -> None:
        now = time.monotonic()
        self._log.apply(changes, now)
        self._is_current = self._is_current or changes.reset
        if self._buffer is not None:
            self._buffer.add(changes)
        elif self._listening and self._num_waiting == 0 and now - self._heard_at > _FORGET_S:
            self._listening = False
            self._source.watch_blocks(enabled=False)
        self._changed.set()
        self._changed = asyncio.Event()


class TrtBuffer:
    """The latest events in TensorRT-LLM's form."""

    def __init__(self, max_size: int, *, window_size: int, num_blocks: int) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=max_size)
        self._window_size = window_size
        self._next_id = 0
        self._add({"type": "created", "num_blocks_per_cache_level": [num_blocks]})

    def add(self, changes: BlockChanges) -> None:
        for block in changes.described:
            stored = {
                "block_hash": block.key,
                "tokens": [{"token_id": token_id, "token_extra_id": 0} for token_id in block.token_ids],
                "cache_level": 0,
                "priority": _PRIORITY,
            }
            self._add({"type": "stored", "parent_hash": block.parent, "blocks": [stored]})
        removed = unpack_keys(changes.removed).tolist()
        if removed:
            self._add({"type": "removed", "block_hashes": removed})

    def drain(self) -> list[dict[str, Any]]:
        events = list(self._events)
        self._events.clear()
        return events

    def _add(self, data: dict[str, Any]) -> None:
        self._events.append({"event_id": self._next_id, "window_size": self._window_size, "data": data})
        self._next_id += 1
