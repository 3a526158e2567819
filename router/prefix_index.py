"""Which worker has which KV blocks in its prefix cache, as far as its events and our own requests tell.

Pure. Blocks are keys (diptych.block_hash). A worker's *known* blocks follow its events; *expected* ones are
those that a request on its way there will bring: without them, ten requests that come at once with the same
new prompt would go to ten workers. An expectation ends some time after its request.
"""

from collections.abc import Sequence

from diptych.block_hash import unpack_keys
from diptych.wire import KvEvents

_EXPECT_S = 120.0  # after it was sent off, a request has computed its prompt
_SETTLE_S = 2.0  # after it has ended, its events are here
_SWEEP = 4096  # expected blocks of a worker, above which those that are over are swept out


class _Holdings:
    __slots__ = ("epoch", "expected", "known", "last", "sweep_at")

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.last = 0
        self.known: set[int] = set()
        self.expected: dict[int, float] = {}  # until when
        self.sweep_at = _SWEEP


class PrefixIndex:
    def __init__(self) -> None:
        self._workers: dict[str, _Holdings] = {}

    def position(self, worker_id: str) -> tuple[str | None, int]:
        """Epoch and number of the last event taken in; (None, 0): none yet."""
        holdings = self._workers.get(worker_id)
        return (None, 0) if holdings is None else (holdings.epoch, holdings.last)

    def apply(self, worker_id: str, asked: tuple[str | None, int], events: KvEvents) -> bool:
        """Take in the answer to a question from position `asked`. False: it does not follow on what is known,
        and the worker's blocks are unknown until it tells all of them."""
        holdings = self._workers.setdefault(worker_id, _Holdings())
        changes = events.changes
        if changes is not None and changes.reset:
            holdings.known = set(unpack_keys(changes.stored))
            if events.epoch != holdings.epoch:
                holdings.expected.clear()  # of a process that is gone
        elif asked != (holdings.epoch, holdings.last) or events.epoch != holdings.epoch:
            del self._workers[worker_id]
            return False
        elif changes is not None:
            removed = unpack_keys(changes.removed)
            holdings.known.difference_update(removed)
            holdings.known.update(unpack_keys(changes.stored))
            for key in removed:
                holdings.expected.pop(key, None)
        elif events.last != holdings.last:
            del self._workers[worker_id]
            return False
        holdings.epoch, holdings.last = events.epoch, events.last
        return True

    def expect(self, worker_id: str, keys: Sequence[int], now: float) -> None:
        """A request with these blocks goes to this worker."""
        holdings = self._workers.get(worker_id)
        if holdings is None:
            return  # a worker that tells nothing is one whose cache is not known
        expected = holdings.expected
        expected.update(dict.fromkeys(keys, now + _EXPECT_S))
        if len(expected) > holdings.sweep_at:
            holdings.expected = {
                key: until for key, until in expected.items() if until > now and key not in holdings.known
            }
            holdings.sweep_at = max(_SWEEP, 2 * len(holdings.expected))

    def settle(self, worker_id: str, keys: Sequence[int], now: float) -> None:
        """That request has ended: what it brought shows in events, or it brought nothing."""
        holdings = self._workers.get(worker_id)
        if holdings is not None:
            for key in keys:
                if key in holdings.expected:
                    holdings.expected[key] = now + _SETTLE_S

    def match(self, worker_id: str, keys: Sequence[int], now: float) -> int:
        """How many of a prompt's blocks the worker has, from the first one on without a gap."""
        holdings = self._workers.get(worker_id)
        if holdings is None:
            return 0
        known, expected = holdings.known, holdings.expected
        count = 0
        for key in keys:
            if key not in known and expected.get(key, 0.0) <= now:
                break
            count += 1
        return count

    def drop(self, worker_id: str) -> None:
        """The worker is gone, and its cache with it."""
        self._workers.pop(worker_id, None)

    def size(self, worker_id: str) -> int:
        """Blocks that are known to be there."""
        holdings = self._workers.get(worker_id)
        return 0 if holdings is None else len(holdings.known)

    @property
    def worker_ids(self) -> tuple[str, ...]:
        return tuple(self._workers)
