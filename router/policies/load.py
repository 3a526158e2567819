"""How busy a worker is: with legs of this router, and with what it says that others gave it."""

from collections import Counter

from diptych.router.policies.request import RouteRequest
from diptych.router.worker_view import WorkerView

_TYPICAL_TOKENS = 512  # of a request, while there is nothing to judge by


class RequestLoad:
    """In requests."""

    def of(self, worker: WorkerView) -> float:
        return worker.in_flight + worker.elsewhere

    def add(self, request: RouteRequest, worker: WorkerView) -> None:
        """Requests are counted by the pool."""

    def remove(self, request: RouteRequest, worker: WorkerView) -> None:
        """Requests are counted by the pool."""


class TokenLoad:
    """In prompt tokens that are not in the worker's cache; requests of others count as typical ones."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter()
        self._typical = float(_TYPICAL_TOKENS)

    def of(self, worker: WorkerView) -> float:
        return self._tokens[worker.worker_id] + worker.elsewhere * self._typical

    def add(self, request: RouteRequest, worker: WorkerView) -> None:
        tokens = _uncached(request, worker)
        self._tokens[worker.worker_id] += tokens
        self._typical += (tokens - self._typical) / 32

    def remove(self, request: RouteRequest, worker: WorkerView) -> None:
        self._tokens[worker.worker_id] -= _uncached(request, worker)
        if self._tokens[worker.worker_id] <= 0:
            del self._tokens[worker.worker_id]  # workers come and go; the table must not grow


Load = RequestLoad | TokenLoad


def make_load(*, use_tokens: bool) -> Load:
    return TokenLoad() if use_tokens else RequestLoad()


def _uncached(request: RouteRequest, worker: WorkerView) -> int:
    return max(1, request.num_tokens - request.matched(worker))
