"""What a policy may know of the leg that it finds a worker for. Never the request's text."""

from collections.abc import Mapping

import msgspec

from diptych.router.worker_view import WorkerView


class RouteRequest(msgspec.Struct, frozen=True):
    num_tokens: int = 0  # of the prompts; an estimate unless something has tokenized them
    matched_tokens: Mapping[str, int] = {}  # by worker id: found in its prefix cache
    session: str | None = None  # requests with the same one belong together

    def matched(self, worker: WorkerView) -> int:
        return self.matched_tokens.get(worker.worker_id, 0)
