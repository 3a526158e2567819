"""How many requests one router process lets run: what the configuration says, or what the workers can use."""

from diptych.router.pool import Pool

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

    def limit(self) -> int:
        total = self._configured
        if total is None:
            total = _DEPTH * sum(
                _UNKNOWN_BATCH if worker.facts is None else worker.facts.max_batch_size or _UNKNOWN_BATCH
                for worker in self._pool.ready("GENERATION")
            )
        return max(1, -(-(total or _UNKNOWN_BATCH) // self._num_processes))

    def max_waiting(self, configured: int | None) -> int:
        """`configured`: of all processes together; None: in proportion to how many run, or to the usual worker."""
        if configured is None:
            configured = _WAITING * (self._configured or _DEPTH * _UNKNOWN_BATCH)
        return -(-configured // self._num_processes)
