"""Each worker in turn."""

from collections.abc import Sequence
from itertools import count

from diptych.router.pool import WorkerView


class RoundRobin:
    def __init__(self) -> None:
        self._turn = count()

    def pick(self, candidates: Sequence[WorkerView]) -> WorkerView:
        return candidates[next(self._turn) % len(candidates)]
