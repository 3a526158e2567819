"""What both legs have in common: how a request goes to a worker, and what its failure means."""

import logging
import time

import orjson

from diptych.errors import DeadlineExceeded, DiptychError, Unavailable, WorkerLost
from diptych.journal import HEADER
from diptych.router.exchange import Exchange, Reply
from diptych.router.frontends.openai import Call
from diptych.router.metrics import LegMetrics
from diptych.router.pool import Pool
from diptych.router.worker_view import LegRole, WorkerView

_log = logging.getLogger(__name__)
_JOURNAL = f"{HEADER}: 1\r\n".encode()


class Leg:
    """One role's legs of every request."""

    def __init__(self, role: LegRole, pool: Pool, metrics: LegMetrics) -> None:
        self.name = role.lower()
        self.metrics = metrics
        self._pool = pool

    def send(
        self, worker: WorkerView, call: Call, body: bytes, *, journal: bytearray | None = None
    ) -> Exchange:
        """`journal`: ask for one, and keep it there."""
        headers = call.headers(time.monotonic())
        if journal is not None:
            headers += _JOURNAL
        exchange = worker.client.exchange(
            "POST", call.path, deadline=call.deadline, headers=headers, body=body
        )
        exchange.journal = journal
        return exchange

    def count_attempt(self, attempt: int) -> None:
        self.metrics.total.inc()
        if attempt:
            self.metrics.retries.inc()

    def note_failure(self, call: Call, worker: WorkerView, error: DiptychError) -> None:
        """Only a lost worker is down for others, too."""
        self.metrics.errors.inc()
        if isinstance(error, WorkerLost):
            self._pool.report_lost(worker, error)
        _log.warning("request %s: %s leg: %s", call.request_id, self.name, error.message)

    def note_refusal(self, call: Call, worker: WorkerView, reply: Reply) -> None:
        self.metrics.errors.inc()
        worker.kick.set()  # it may be draining: ask it before others do
        _log.info(
            "request %s: %s leg: worker %s answers %d",
            call.request_id,
            self.name,
            worker.worker_id,
            reply.status,
        )

    def nobody(self, retry_after_s: float) -> Unavailable:
        return Unavailable(f"No {self.name} worker is ready.", retry_after_s=retry_after_s)


def is_late(call: Call, error: DiptychError) -> bool:
    """The request's own deadline has passed, and not only a worker's patience."""
    return isinstance(error, DeadlineExceeded) and time.monotonic() >= call.deadline


def left(call: Call) -> float:
    """Seconds for the last bytes to reach the client: a little even when the deadline is what ended it."""
    return max(1.0, call.deadline - time.monotonic())


def unavailable(worker: WorkerView, reply: Reply) -> Unavailable:
    """A worker's 503, with its reason when it gives one."""
    try:
        error = orjson.loads(reply.body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        message, code = f"The worker at {worker.client.url} answers 503.", None
    retry_after = reply.head.get("Retry-After") or ""
    return Unavailable(
        message, code=code, retry_after_s=float(retry_after) if retry_after.isdigit() else None
    )
