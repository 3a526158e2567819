"""What the token that a sequence drew means for it: an event, and perhaps its end or a lease for a peer."""

from diptych.wire import FinishReason, SequenceTimes, TokenEvent
from diptych.worker.blocks import BlockPool
from diptych.worker.live import LiveSequences
from diptych.worker.plan import Drawn, Offer, SchedulerLimits
from diptych.worker.sequence import Sequence


class Outcomes:
    def __init__(self, limits: SchedulerLimits, pool: BlockPool, live: LiveSequences) -> None:
        self._limits = limits
        self._pool = pool
        self._live = live
        self.num_generated_tokens = 0

    def take(
        self,
        sequence: Sequence,
        drawn: Drawn | str,
        now: float,
        events: list[TokenEvent],
        offers: list[Offer],
    ) -> None:
        """`drawn`: the token, or why there is none. What comes of it is added to `events` and `offers`."""
        if isinstance(drawn, str):
            self._live.end(sequence, "error", error=drawn)
            return
        sequence.tokens.append(drawn.token_id)
        self.num_generated_tokens += 1
        finish_reason = self._finish_reason(sequence, drawn.token_id)
        stop_token = drawn.token_id if finish_reason == "stop" else None
        event = TokenEvent(
            request_id=sequence.id,
            token_ids=[drawn.token_id],
            logprobs=None if drawn.logprob is None else [drawn.logprob],
            prompt_logprobs=sequence.prompt_logprobs if sequence.tells_prompt else None,
            finish_reason=finish_reason,
            stop_token_id=None if stop_token in self._limits.eos_token_ids else stop_token,
            num_cached_tokens=None if sequence.first_token_sent else sequence.num_cached,
            times=None if sequence.first_token_sent else _times(sequence, now),
        )
        sequence.first_token_sent = True
        if finish_reason is None and sequence.request.request_type == "context_only":
            blocks = list(sequence.blocks)
            self._pool.lease(blocks)
            self._live.forget(sequence)
            offers.append(Offer(sequence, blocks, event))
            return
        if finish_reason is not None:
            self._live.forget(sequence)
        events.append(event)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        params = sequence.request.params
        if sequence.num_outputs >= params.min_tokens:
            if token_id in params.stop_token_ids:
                return "stop"
            if token_id in self._limits.eos_token_ids and not params.ignore_eos:
                return "stop"
        if sequence.num_outputs >= params.max_tokens or len(sequence.tokens) >= self._limits.max_seq_len:
            return "length"
        return None


def _times(sequence: Sequence, now: float) -> SequenceTimes:
    scheduled = now if sequence.scheduled_at is None else sequence.scheduled_at
    ready = scheduled if sequence.fetched_at is None else sequence.fetched_at
    fetch = sequence.fetch_times or SequenceTimes()
    return SequenceTimes(
        follow_s=sequence.queued_at - sequence.arrival,
        queue_s=scheduled - sequence.queued_at,
        fetch_s=ready - scheduled,
        prefill_s=now - ready,
        wire_s=fetch.wire_s,
        wire_bytes=fetch.wire_bytes,
        fetched=fetch.fetched,
        transport=fetch.transport,
        ready_at=ready,
        drawn_at=now,
    )
