"""What the router knows of one worker, and whether it may be given a leg. Knows neither registry nor requests."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Literal

from diptych.router.client import NO_HEADERS, WorkerClient
from diptych.router.probe import WorkerFacts
from diptych.router.settings import Limits
from diptych.wire import WorkerInfo

LegRole = Literal["CONTEXT", "GENERATION"]
_PROVEN = 32  # legs at once that end a probation


class WorkerView:
    __slots__ = (
        "_models",
        "allowance",
        "client",
        "elsewhere",
        "facts",
        "in_flight",
        "incarnation",
        "info",
        "is_dropped",
        "kick",
        "misses",
        "news",
        "probed",
    )

    def __init__(self, info: WorkerInfo, limits: Limits, headers: Mapping[str, str] = NO_HEADERS) -> None:
        self.info = info
        self.client = WorkerClient(info.url, limits, headers)
        self.facts: WorkerFacts | None = None  # None: down, or not asked yet
        self._models: tuple[str, ...] = ()
        self.probed = False
        self.misses = 0  # probes in a row that were not answered in time
        self.incarnation = ""  # of the process that answered last
        self.allowance: int | None = None  # legs at once while it is on probation; None: it is not
        self.in_flight = 0
        self.elsewhere = 0.0  # requests that others gave it, when it was last asked
        self.kick = asyncio.Event()
        self.is_dropped = False  # it gets no new legs: the registry took it away
        self.news = False  # the kick came from the registry: no reason to wait before the probe

    @property
    def worker_id(self) -> str:
        return self.info.worker_id

    @property
    def ready(self) -> bool:
        facts = self.facts
        if facts is None or facts.state != "READY" or self.info.state != "READY":
            return False
        return not self.is_replaced

    @property
    def is_replaced(self) -> bool:
        """Another process answers at its address, and its place in the registry has not ended yet."""
        announced, found = self.info.incarnation, self.facts.incarnation if self.facts is not None else ""
        return bool(announced and found) and announced != found

    @property
    def state(self) -> str:
        """For people: READY, STARTING, DRAINING or DOWN."""
        if self.facts is None or self.is_replaced:
            return "DOWN" if self.probed else "STARTING"
        return self.info.state if self.info.state != "READY" else self.facts.state

    @property
    def is_full(self) -> bool:
        """On probation after it was down, and with as many legs as it may have."""
        return self.allowance is not None and self.in_flight >= self.allowance

    @property
    def models(self) -> tuple[str, ...]:
        """The names it answers to, also while it is down; empty when nobody has said."""
        return self._models or ((self.info.model,) if self.info.model else ())

    def learn(self, facts: WorkerFacts | None) -> None:
        self.facts = facts
        if facts is not None and facts.models:
            self._models = facts.models

    def note_load(self, num_requests: float) -> None:
        """What it says it has to do; ours is a part of that."""
        self.elsewhere = max(0.0, num_requests - self.in_flight)

    def has_role(self, role: LegRole) -> bool:
        return self.info.role in (role, "BOTH")

    def serves(self, model: str | None) -> bool:
        """True as well when either side does not name a model."""
        return model is None or not self.models or model in self.models

    def __enter__(self) -> "WorkerView":
        self.in_flight += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.in_flight -= 1
        if self.allowance is not None and error is None:
            self.allowance = self.allowance * 2 if self.allowance < _PROVEN else None
