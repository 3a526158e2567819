"""The worker that has to do least for a request: what of the prompt is not in its cache, against its load.

    cost = uncached tokens + load_weight * load

in tokens. With `use_tokens` the load is the uncached prompt tokens in flight: what the request waits for.
Without, each request above the least busy worker's counts as much as this prompt: with the weight of 0.25,
four of them outweigh a prompt that is all in the cache. Either way a prefix that everybody shares draws
requests to its worker only until waiting there costs more than computing the prefix elsewhere; then it is in
two caches.
"""

import random
from collections.abc import Sequence

from diptych.config.routing import KvCacheAwareOptions
from diptych.router.policies.load import make_load
from diptych.router.policies.request import RouteRequest
from diptych.router.worker_view import WorkerView

_REQUEST_WEIGHT = 0.25
_TOKEN_WEIGHT = 1.0


class KvCacheAware:
    def __init__(self, options: KvCacheAwareOptions, rng: random.Random) -> None:
        self._load = make_load(use_tokens=options.use_tokens)
        self._use_tokens = options.use_tokens
        default = _TOKEN_WEIGHT if options.use_tokens else _REQUEST_WEIGHT
        self._weight = default if options.load_weight is None else options.load_weight
        self._cap = float("inf") if options.load_cap is None else options.load_cap
        self._max_batch_size = options.max_batch_size
        self._rng = rng

    def pick(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        # In a full worker a request waits for another one to end, however much of it is cached.
        open_workers = [worker for worker in workers if self._num_requests(worker) < self._max_batch_size]
        candidates = open_workers or list(workers)
        loads = [min(self._load.of(worker), self._cap) for worker in candidates]
        least = min(loads)
        scale = 1 if self._use_tokens else max(1, request.num_tokens)
        costs = [
            self._weight * scale * (load - least) - request.matched(worker)
            for worker, load in zip(candidates, loads, strict=True)
        ]
        lowest = min(costs)
        best = [index for index, cost in enumerate(costs) if cost == lowest]
        # Of equals the less busy one: with a weight of 0 nothing else would look at the load.
        shortest = min(loads[index] for index in best)
        return candidates[self._rng.choice([index for index in best if loads[index] == shortest])]

    def started(self, request: RouteRequest, worker: WorkerView) -> None:
        self._load.add(request, worker)

    def ended(self, request: RouteRequest, worker: WorkerView) -> None:
        self._load.remove(request, worker)

    def _num_requests(self, worker: WorkerView) -> float:
        return worker.in_flight + worker.elsewhere
