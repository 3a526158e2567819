"""Takes a request in, and sees to it that it ends in exactly one way. Knows the OpenAI face, and no sockets."""

import asyncio
import logging
import random
import time

from diptych.errors import DiptychError, InvalidRequest
from diptych.router.admission import Admission
from diptych.router.api_keys import ApiKeys
from diptych.router.downstream import Answered, Downstream
from diptych.router.flow import Flow
from diptych.router.frontends.openai import parse_call, request_id_of
from diptych.router.metrics import Metrics
from diptych.router.request_head import RequestHead
from diptych.router.status import StartGate

_log = logging.getLogger(__name__)
_TIMEOUT_HEADER = "X-Diptych-Timeout-Ms"


class Edge:
    def __init__(
        self,
        flow: Flow,
        metrics: Metrics,
        keys: ApiKeys,
        admission: Admission,
        gate: StartGate,
        *,
        timeout_s: float,
    ) -> None:
        self._flow = flow
        self._metrics = metrics
        self._keys = keys
        self._admission = admission
        self._gate = gate
        self._timeout_s = timeout_s
        self._random = random.Random()  # seeded by the system; ids are unique, not secret

    async def __call__(self, head: RequestHead, body: bytes, client: Downstream, arrived: float) -> None:
        metrics = self._metrics
        metrics.requests.inc()
        unique_id = f"{self._random.getrandbits(128):032x}"
        request_id = request_id_of(head) or unique_id
        client.set_header("X-Request-ID", request_id)
        try:
            answered = await self._run(head, body, client, arrived, request_id, unique_id)
        except (asyncio.CancelledError, ConnectionResetError):
            metrics.cancelled.inc()
            _log.info("request %s: the client went away", request_id)
            raise
        except DiptychError as error:
            if isinstance(error, InvalidRequest):
                metrics.validation_errors.inc()
            _log.info("request %s: %d %s", request_id, error.status, error.message)
            answered = await client.fail(error, 1.0)
        except Exception:
            metrics.internal_errors.inc()
            _log.exception("request %s: a fault of the router", request_id)
            answered = await client.fail(DiptychError("The router failed; its log has the details."), 1.0)
        (metrics.http_errors if client.failed else metrics.responses).inc()
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("request %s: %d, %.4f s", request_id, answered.status, time.monotonic() - arrived)

    async def _run(
        self,
        head: RequestHead,
        body: bytes,
        client: Downstream,
        arrived: float,
        request_id: str,
        unique_id: str,
    ) -> Answered:
        key = self._keys.check(head.get("Authorization"))
        self._gate.check()
        call = parse_call(
            head.path,
            head,
            body,
            request_id=request_id,
            unique_id=unique_id,
            arrived=arrived,
            timeout_s=self._timeout(head),
        )
        (self._metrics.stream_requests if call.stream else self._metrics.nonstream_requests).inc()
        admission = self._admission
        await admission.enter(key, call.deadline)
        entered = time.monotonic()
        is_whole = False
        try:
            answered = await self._flow.run(call, client)
            is_whole = not client.failed
        finally:
            admission.leave(time.monotonic() - entered, is_whole=is_whole)
        return answered

    def _timeout(self, head: RequestHead) -> float:
        """The configuration's, or a shorter one that the client asks for."""
        given = head.get(_TIMEOUT_HEADER)
        if given is None:
            return self._timeout_s
        if not given.isdecimal():
            raise InvalidRequest(
                f"{_TIMEOUT_HEADER} is {given!r}; it must be a whole number of milliseconds."
            )
        return min(self._timeout_s, int(given) / 1000)
