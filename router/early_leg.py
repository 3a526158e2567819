"""A generation leg that is sent together with its context leg (schedule_style generation_first).

It follows the prefill from engine to engine and may have its first bytes before the context leg has answered; they
wait here until the client has those of the context leg. Whatever goes wrong with it costs nothing but the time
saved: the leg is then sent once more, in context_first's order.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType

from diptych.router.exchange import Exchange
from diptych.router.leg import Leg
from diptych.router.pool import WorkerView
from diptych.router.routing import Route


class EarlyLeg:
    """Use as ``async with``: leaving cancels what was not taken."""

    def __init__(self, leg: Leg, route: Route) -> None:
        self._leg = leg
        self._route = route
        self._beside: Route | None = None
        self._exchange: Exchange | None = None
        self._entering: asyncio.Task[Exchange] | None = None
        self.worker: WorkerView | None = None  # None: it was not sent, or is cancelled
        self.journal = bytearray()

    async def __aenter__(self) -> "EarlyLeg":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()

    def send(self, context: WorkerView, candidates: Sequence[WorkerView]) -> bool:
        """To one of the candidates; False when none can follow that context worker. Call it once."""
        endpoint = context.facts.kv_endpoint if context.facts is not None else ""
        others = [worker for worker in candidates if worker is not context]
        if not (endpoint and others):
            return False
        call = self._route.call
        self._beside = self._route.beside()
        self.worker = self._beside.pick("GENERATION", others)
        self.worker.in_flight += 1
        journal = self.journal if call.stream else None
        self._exchange = self._leg.send(self.worker, call, call.early_body(endpoint), journal=journal)
        self._entering = asyncio.create_task(self._exchange.__aenter__(), name=f"early-leg-{call.request_id}")
        return True

    @asynccontextmanager
    async def exchange(self) -> AsyncIterator[Exchange]:
        """The response's head is here; raises what sending it raised."""
        assert self._entering is not None
        try:
            yield await self._entering
        finally:
            await self.cancel()

    async def cancel(self) -> None:
        """Close the connection, and with it the leg, unless it is over."""
        worker, self.worker = self.worker, None
        if worker is None:
            return
        assert self._beside is not None and self._exchange is not None and self._entering is not None
        worker.in_flight -= 1
        self._beside.end()
        self._entering.cancel()
        await asyncio.gather(self._entering, return_exceptions=True)
        await self._exchange.__aexit__(None, None, None)
