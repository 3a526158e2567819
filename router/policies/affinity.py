"""Sends the requests of a session to the same worker, around any other policy.

A session's worker is found by rendezvous hashing: every router process finds the same one without asking,
and when workers come and go, only sessions of those workers move. A worker that is much busier than the
others is passed over for the session's next one; where another worker's cache holds more of the prompt, the
policy decides.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diptych.router.fields import Headers
from diptych.router.policies.load import RequestLoad
from diptych.router.policies.request import RouteRequest
from diptych.router.worker_view import WorkerView

if TYPE_CHECKING:
    from diptych.router.policies import RoutingPolicy

HEADERS = ("X-Session-ID", "X-Correlation-ID", "x-session-affinity", "x-multi-turn-session-id")

_EXCESS = 1.25  # of the mean load
_SLACK = 2  # requests: an idle worker is not "much less busy" than one that runs two


def session_of(headers: Headers) -> str | None:
    """The session that a request says it belongs to; the first header of `HEADERS` wins."""
    for name in HEADERS:
        session = headers.get(name)
        if session:
            return session
    return None


class SessionAffinity:
    def __init__(self, policy: "RoutingPolicy") -> None:
        self._policy = policy
        self._load = RequestLoad()

    def pick(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        if request.session is not None:
            home = self._home(request.session, workers)
            if all(request.matched(worker) <= request.matched(home) for worker in workers):
                return home
        return self._policy.pick(request, workers)

    def started(self, request: RouteRequest, worker: WorkerView) -> None:
        self._policy.started(request, worker)

    def ended(self, request: RouteRequest, worker: WorkerView) -> None:
        self._policy.ended(request, worker)

    def _home(self, session: str, workers: Sequence[WorkerView]) -> WorkerView:
        loads = [self._load.of(worker) for worker in workers]
        limit = _EXCESS * sum(loads) / len(loads) + _SLACK
        fit = [worker for worker, load in zip(workers, loads, strict=True) if load <= limit]
        return max(fit, key=lambda worker: _weight(session, worker.worker_id))


def _weight(session: str, worker_id: str) -> bytes:
    return hashlib.blake2b(f"{session}\0{worker_id}".encode(), digest_size=8).digest()
