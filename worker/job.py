"""One HTTP request on this worker: its choices, their sequences in the engine, and the events that come back."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

import msgspec

from diptych.errors import DeadlineExceeded, DiptychError, from_wire
from diptych.journal import Entry, journal_line
from diptych.openai import (
    ChatRequest,
    ChoiceResult,
    CompletionRequest,
    DisaggregatedParams,
    ResponseHead,
    Usage,
    encode_ticket,
)
from diptych.telemetry import Timeline
from diptych.text import Delta
from diptych.wire import SequenceTimes, TokenEvent
from diptych.worker.choices import Choice, ChoiceBuilder
from diptych.worker.interval import StreamInterval
from diptych.worker.service import WorkerService

log = logging.getLogger(__name__)

_GRACE_S = 10.0  # the engine ends late sequences itself; this is for an engine that says nothing


class Job:
    """Iterate over `deltas`; leaving early, by an error or because the client went, aborts what still runs."""

    def __init__(
        self,
        service: WorkerService,
        request: CompletionRequest | ChatRequest,
        head: ResponseHead,
        prompts: list[list[int]],
        timeline: Timeline,
        *,
        request_id: str,
        timeout_s: float,
        journaled: bool = False,
    ) -> None:
        """`journaled`: keep what `take_journal_line` gives."""
        self.head = head
        self.request_id = request_id
        self._service = service
        self._request = request
        self._timeline = timeline
        self._timeout_s = timeout_s
        self._leg = request.disaggregated_params
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._first_token_at: float | None = None
        self._prompts = prompts
        self.choices = ChoiceBuilder(service, request, head, timeout_s).build(prompts)
        self._open: dict[str, Choice] = {}
        self.journaled = journaled
        # The first line names every choice.
        self._entries = [Entry(choice.index) for choice in self.choices]

    @property
    def is_context_leg(self) -> bool:
        return self._leg is not None and self._leg.request_type == "context_only"

    @property
    def stage_prefix(self) -> str:
        """What tells the stages of the two legs apart in one Server-Timing header."""
        prefixes = {"context_only": "ctx_", "generation_only": "gen_"}
        return prefixes.get(self._leg.request_type, "") if self._leg else ""

    @property
    def has_fetched(self) -> bool | None:
        """Whether a generation leg has done with the ticket of every choice; None: not known yet."""
        if self._leg is None or self._leg.request_type != "generation_only":
            return None
        fetched = [choice.has_fetched for choice in self.choices if choice.submit is not None]
        return None if None in fetched else all(fetched)

    @property
    def finished(self) -> bool:
        return all(choice.is_done and choice.text.finish_reason != "not_finished" for choice in self.choices)

    def start(self) -> None:
        for choice in self.choices:
            if choice.submit is not None:
                self._open[choice.submit.request_id] = choice
                self._service.engine.submit(choice.submit, self._events.put_nowait)

    async def deltas(self) -> AsyncGenerator[list[tuple[Choice, Delta]], None]:
        """What each engine step brings, until every choice is done. Raises the first error of any choice.

        A stream gets it by `stream_interval` tokens.
        """
        interval = StreamInterval[Choice](self._service.config.stream_interval if self._request.stream else 1)
        while self._open:
            events = [await self._next_event()]
            while not self._events.empty():
                events.append(self._events.get_nowait())
            batch = []
            for event in events:
                choice = self._open.get(event.request_id)
                if choice is None:
                    continue
                if event.handed_over:
                    self._take_over(choice, event)
                else:
                    batch.append((choice, self._feed(choice, event)))
            if due := interval.add(batch):
                yield due

    def close(self) -> None:
        """Whatever still runs stops; tickets that nobody will get give their blocks back."""
        for request_id in self._open:
            self._service.engine.abort(request_id)
        self._open.clear()
        while not self._events.empty():
            self._release(self._events.get_nowait())
        if self._first_token_at is not None:
            self._service.metrics.e2e_latency.observe(time.monotonic() - self._timeline.started)
            for choice in self.choices:
                self._service.metrics.finished(choice.text.finish_reason or "cancelled")
            num_tokens = max(len(choice.text.token_ids) for choice in self.choices)
            if num_tokens > 1:
                elapsed = time.monotonic() - self._first_token_at
                self._service.metrics.token_time.observe(elapsed / (num_tokens - 1))

    def take_journal_line(self) -> bytes:
        """What the deltas since the last call have brought, in tokens; empty without a journal."""
        if not self.journaled:
            return b""
        entries, self._entries = self._entries, []
        return journal_line(entries)

    def ticket_ids(self) -> list[str]:
        """What a context leg gives away."""
        handed_on = (choice.handed_on for choice in self.choices)
        return [handed.ticket_id for handed in handed_on if handed is not None and handed.ticket_id]

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(map(len, self._prompts)),
            completion_tokens=sum(len(choice.text.token_ids) for choice in self.choices),
            # The choices of one prompt share it: its hits count once.
            cached_tokens=sum(choice.cached_tokens for choice in self.choices[:: self._request.n]),
        )

    def running_usage(self) -> Usage | None:
        """For a chunk of a stream, when the client asked for it with every one."""
        return self.usage() if self._request.continuous_usage else None

    def results(self) -> list[ChoiceResult]:
        return [
            ChoiceResult.of(
                choice.index,
                choice.text,
                with_token_ids=self._request.return_token_ids,
                disaggregated_params=choice.handed_on,
            )
            for choice in self.choices
        ]

    @property
    def prompts(self) -> list[list[int]]:
        return self._prompts

    # Events

    async def _next_event(self) -> TokenEvent:
        try:
            return await asyncio.wait_for(self._events.get(), self._timeout_s + _GRACE_S)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"no answer from the engine within {self._timeout_s:g} s") from None

    def _take_over(self, choice: Choice, event: TokenEvent) -> None:
        """The tokens of the context leg, which prints them: as if they had come with the request."""
        assert choice.submit is not None
        choice.submit = msgspec.structs.replace(choice.submit, output_token_ids=event.token_ids)
        choice.cached_tokens = event.num_cached_tokens or 0
        choice.text.feed(event)
        if choice.is_done:
            del self._open[event.request_id]
            self._service.engine.abort(event.request_id)

    def _feed(self, choice: Choice, event: TokenEvent) -> Delta:
        if event.error is not None:
            del self._open[event.request_id]
            log.warning("%s: %s", self.request_id, event.error)
            raise _error(event)
        if event.times is not None:
            choice.has_fetched = event.times.fetched
            if self._first_token_at is None:
                self._note_first_token(event.times)
        cached = event.num_cached_tokens if choice.submit and not choice.submit.output_token_ids else None
        if cached is not None:
            choice.cached_tokens = cached
        delta = choice.text.feed(event)
        if self.journaled:
            stop_token = event.stop_token_id
            entry = Entry(choice.index, delta.token_ids, cached, event.finish_reason, stop_token)
            self._entries.append(entry)
        if self.is_context_leg:
            choice.handed_on = self._hand_on(choice, event, delta)
        if delta.finish_reason is not None:
            del self._open[event.request_id]
            if event.finish_reason is None and delta.finish_reason != "not_finished":
                # A stop string: the engine does not know it yet.
                self._service.engine.abort(event.request_id)
                self._release(event)
        return delta

    def _hand_on(self, choice: Choice, event: TokenEvent, delta: Delta) -> DisaggregatedParams:
        leg = self._leg
        assert leg is not None
        goes_on = delta.finish_reason == "not_finished"
        return DisaggregatedParams(
            request_type="context_only",
            disagg_request_id=leg.disagg_request_id,
            response_id=self.head.id,
            created=self.head.created,
            ctx_request_id=event.request_id,
            first_gen_tokens=event.token_ids,
            first_gen_logprobs=event.logprobs,
            prompt_logprobs=event.prompt_logprobs,
            encoded_opaque_state=encode_ticket(event.ticket) if goes_on and event.ticket else None,
            ticket_id=event.ticket_id if goes_on else None,
            cached_tokens=choice.cached_tokens,
            finish_reason=None if goes_on else event.finish_reason,
            stop_reason=None if goes_on else delta.stop_reason,
        )

    def _note_first_token(self, times: SequenceTimes) -> None:
        self._first_token_at = time.monotonic()
        wire_s = min(times.wire_s, times.fetch_s)
        self._timeline.mark_split(
            [
                *([("follow", times.follow_s)] if times.follow_s else []),
                ("queue", times.queue_s),
                ("fetch", times.fetch_s - wire_s),
                ("wire", wire_s),
                ("prefill", times.prefill_s),
            ],
            rest="engine_link",
        )
        metrics = self._service.metrics
        metrics.time_to_first_token.observe(self._timeline.total_s)
        metrics.queue_time.observe(times.queue_s)
        self._service.perf.append(
            {
                "request_id": self.request_id,
                "follow_s": times.follow_s,
                "queue_s": times.queue_s,
                "fetch_s": times.fetch_s,
                "wire_s": times.wire_s,
                "wire_bytes": times.wire_bytes,
                "transport": times.transport,
                "prefill_s": times.prefill_s,
                "first_token_s": self._timeline.total_s,
                "ready_at": times.ready_at,
                "drawn_at": times.drawn_at,
            }
        )

    def _release(self, event: TokenEvent) -> None:
        if event.ticket_id is not None:
            self._service.engine.release(event.ticket_id)


def _error(event: TokenEvent) -> DiptychError:
    if event.finish_reason == "timeout":
        return DeadlineExceeded(event.error or "the request's deadline has passed")
    return from_wire(event.error_status, {"message": event.error})
