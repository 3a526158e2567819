"""A generation leg that is sent together with its context leg (schedule_style generation_first).

It follows the prefill from engine to engine and may have its first bytes before the context leg has answered; a few
of them wait in the exchange until the client has those of the context leg, the worker waits with the rest. Whatever
goes wrong with it costs nothing but the time saved: the leg is then sent once more, in context_first's order.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType

from diptych.router.exchange import Exchange
from diptych.router.leg import Leg
from diptych.router.routing import Route
from diptych.router.worker_view import WorkerView


class EarlyLeg:
    """Use as ``async with``: leaving cancels what was not taken."""

    def __init__(self, leg: Leg, route: Route) -> None:
        self._leg = leg
        self._route = route
        self._sent: _Sent | None = None
        self.journal = bytearray()

    async def __aenter__(self) -> "EarlyLeg":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()

    @property
    def worker(self) -> WorkerView | None:
        """None when it was not sent, or is cancelled."""
        return None if self._sent is None else self._sent.worker

    def send(self, context: WorkerView, candidates: Sequence[WorkerView]) -> bool:
        """To one of the candidates; False when none can follow that context worker. Call it once."""
        endpoint = context.facts.kv_endpoint if context.facts is not None else ""
        others = [worker for worker in candidates if worker is not context]
        if not (endpoint and others):
            return False
        call, route = self._route.call, self._route.beside()
        worker = route.pick("GENERATION", others)
        worker.in_flight += 1
        journal = self.journal if call.stream else None
        exchange = self._leg.send(worker, call, call.early_body(endpoint), journal=journal)
        entering = asyncio.create_task(exchange.__aenter__(), name=f"early-leg-{call.request_id}")
        self._sent = _Sent(worker, route, exchange, entering)
        return True

    @asynccontextmanager
    async def take(self) -> AsyncIterator[Exchange]:
        """The response's head is here; raises what sending it raised. The worker is the taker's to count."""
        sent, self._sent = self._sent, None
        assert sent is not None
        sent.worker.in_flight -= 1
        try:
            yield await sent.entering
        finally:
            await sent.end()

    async def cancel(self) -> None:
        """Close the connection, and with it the leg, unless it was taken."""
        sent, self._sent = self._sent, None
        if sent is not None:
            sent.worker.in_flight -= 1
            await sent.end()


@dataclass(frozen=True, slots=True)
class _Sent:
    worker: WorkerView
    route: Route
    exchange: Exchange
    entering: "asyncio.Task[Exchange]"

    async def end(self) -> None:
        self.route.end()
        self.entering.cancel()
        await self.exchange.__aexit__(None, None, None)
        await asyncio.gather(self.entering, return_exceptions=True)
