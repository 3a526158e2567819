"""The less busy of two workers drawn at random.

Two choices are nearly as good as looking at all, and when several routers see the same stale figures they do
not all run to the same worker (Mitzenmacher, "The power of two choices in randomized load balancing").
"""

import random
from collections.abc import Sequence

from diptych.config.routing import LoadBalancingOptions
from diptych.router.policies.load import make_load
from diptych.router.policies.request import RouteRequest
from diptych.router.worker_view import WorkerView


class LoadBalancing:
    def __init__(self, options: LoadBalancingOptions, rng: random.Random) -> None:
        self._load = make_load(use_tokens=options.use_tokens)
        self._rng = rng

    def pick(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        # The order of a sample is random, so that equals take turns.
        return min(self._rng.sample(workers, min(2, len(workers))), key=self._load.of)

    def started(self, request: RouteRequest, worker: WorkerView) -> None:
        self._load.add(request, worker)

    def ended(self, request: RouteRequest, worker: WorkerView) -> None:
        self._load.remove(request, worker)
