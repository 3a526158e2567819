"""How many requests one router process lets run: what the configuration says, or what the workers can use."""

from collections.abc import Sequence

from diptych.router.pool import Pool
from diptych.router.worker_view import WorkerView

_DEPTH = (
    2  # batches for each generation worker: one that runs, one that waits there so that no step has a gap
)
_UNKNOWN_BATCH = 512  # of a worker that does not say what it takes at once
_WAITING = 4  # times as many may wait as run


class Capacity:
    def __init__(self, pool: Pool, configured: int | None, *, num_processes: int) -> None:
        """`configured`: of all processes together; None: by the workers."""
        self._pool = pool
        self._configured = configured
        self._num_processes = num_processes
        self._workers: Sequence[WorkerView] | None = None  # that the limit was computed for
        self._limit = 1

    def limit(self) -> int:
        workers = self._pool.ready("GENERATION")
        if workers is not self._workers:
            self._workers = workers
            total = self._configured or _DEPTH * sum(map(_batch_of, workers)) or _UNKNOWN_BATCH
            self._limit = max(1, -(-total // self._num_processes))
        return self._limit

    def max_waiting(self, configured: int | None) -> int:
        """`configured`: of all processes together; None: in proportion to how many run, or to the usual worker."""
        if configured is None:
            configured = _WAITING * (self._configured or _DEPTH * _UNKNOWN_BATCH)
        return -(-configured // self._num_processes)


def _batch_of(worker: WorkerView) -> int:
    return (worker.facts.max_batch_size if worker.facts is not None else None) or _UNKNOWN_BATCH
