"""Each worker in turn."""

import random
from collections.abc import Sequence
from itertools import count

from diptych.config.routing import RoundRobinOptions
from diptych.router.policies.request import RouteRequest
from diptych.router.worker_view import WorkerView


class RoundRobin:
    def __init__(self, options: RoundRobinOptions, rng: random.Random) -> None:
        self._turn = count()

    def pick(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        return workers[next(self._turn) % len(workers)]

    def started(self, request: RouteRequest, worker: WorkerView) -> None:
        """Turns do not depend on legs."""

    def ended(self, request: RouteRequest, worker: WorkerView) -> None:
        """Turns do not depend on legs."""
