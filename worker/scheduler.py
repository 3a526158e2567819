"""Decides what the next step computes. Pure: events in, plans out; no torch, no threads, no clock of its own.

It knows no prefill or decode phase. A sequence has known tokens and computed tokens; a step closes the gap under a
token budget, and a sequence whose gap closes draws a token. That one rule covers chunked prefill, prefix hits,
fetched KV, preemption and resuming.

    add, abort, fetch_done, fetch_failed   things that happened
    plan(now) -> StepPlan                  chunks to compute, fetches to start, sequences that ended meanwhile
    commit(plan, tokens) -> Commit         the step's tokens in; events out, and which blocks to offer to a peer

Plans may be made before the last ones are committed, in whose order commits then come: what a step under way draws
counts as known. A sequence that such a step turns out to have ended has its next one computed in vain; its blocks come
back when that is committed.
"""

from collections.abc import Sequence as SequenceOf

from diptych.errors import DiptychError
from diptych.wire import SequenceTimes, Submit, TokenEvent
from diptych.worker.admission import Admission
from diptych.worker.blocks import BlockPool
from diptych.worker.live import LiveSequences
from diptych.worker.outcomes import Outcomes
from diptych.worker.plan import Chunk, Commit, Drawn, Fetch, Offer, SchedulerLimits, StepPlan
from diptych.worker.sequence import Sequence, Status

# A row of logits is a vocabulary of floats: so many of them fit beside the model.
_MAX_TELLING = 256


class _StepsUnderWay(Exception):
    """What would have to be preempted is in a step that is not committed yet."""


class Scheduler:
    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.num_preemptions = 0
        self._live = LiveSequences(limits, pool)
        self._admission = Admission(limits, pool, self._live)
        self._outcomes = Outcomes(limits, pool, self._live)
        self._telling_budget = 0  # tokens left in this step for prompts that tell their logits

    # What happened

    def add(self, request: Submit, now: float, *, arrival: float | None = None) -> None:
        """Queue one sequence. What can never run ends at once with an error event.

        `arrival`: what its deadline counts from, when that is not `now`.
        """
        sequence = Sequence(request, now if arrival is None else arrival)
        sequence.queued_at = now
        try:
            self._admission.validate(sequence)
        except DiptychError as error:
            self._live.ended.append(_error_event(sequence, error.message, error.status))
            return
        self._live.waiting[sequence.id] = sequence

    def abort(self, request_id: str) -> None:
        """End a sequence as cancelled. Unknown ids are ignored: it may have finished already."""
        sequence = self._live.find(request_id)
        if sequence is not None:
            self._live.end(sequence, "cancelled")

    def fetch_done(self, request_id: str, times: SequenceTimes, now: float) -> None:
        sequence = self._live.leave_fetching(request_id)
        if sequence is not None:
            sequence.start_at(sequence.num_prompt)
            sequence.fetched_at = now
            sequence.fetch_times = times
            self._live.publish(sequence)
            self._live.run(sequence)

    def fetch_failed(
        self, request_id: str, times: SequenceTimes, now: float, *, held: SequenceOf[int] = ()
    ) -> None:
        """The prompt's KV will not come: the sequence computes it like any other, and in other blocks when a copy
        lingers in these (`held`), which nobody gets before `unlease`.
        """
        self.pool.lease(held)
        sequence = self._live.leave_fetching(request_id)
        if sequence is None:
            return
        sequence.fetched_at = now
        sequence.fetch_times = times
        if held:
            self._live.wait_again(sequence)
        else:
            self._live.run(sequence)

    def unlease(self, blocks: SequenceOf[int]) -> None:
        """A ticket is over, or what lingered in these blocks."""
        self.pool.unlease(blocks)

    # What there is

    @property
    def has_work(self) -> bool:
        """Whether `plan` should be called again without waiting for an event."""
        return bool(self._live.running or self._live.waiting or self._live.ended)

    @property
    def num_waiting(self) -> int:
        return len(self._live.waiting)

    @property
    def num_running(self) -> int:
        return len(self._live.running)

    def prefills(self) -> list[int]:
        """Of each running sequence whose prompt is not computed, how many tokens of it are left."""
        left = (sequence.num_prompt - sequence.num_computed for sequence in self._live.running.values())
        return [count for count in left if count > 0]

    @property
    def num_fetching(self) -> int:
        return len(self._live.fetching)

    @property
    def num_spare_blocks(self) -> int:
        """Blocks that nobody waits for and no admitted sequence will need."""
        return 0 if self._live.waiting else max(0, self.pool.num_available - self._live.promised())

    @property
    def num_prompt_tokens(self) -> int:
        return self._admission.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        return self._admission.num_cached_tokens

    @property
    def num_generated_tokens(self) -> int:
        return self._outcomes.num_generated_tokens

    def check(self, others: SequenceOf[int] = ()) -> None:
        """Raise AssertionError unless blocks are conserved and owned as the sequences say, or by `others`."""
        self._live.check(others)

    # The step

    def plan(self, now: float) -> StepPlan:
        self._live.expire(now)
        chunks: list[Chunk] = []
        fetches: list[Fetch] = []
        preemptions = self.num_preemptions
        self._telling_budget = _MAX_TELLING
        try:
            budget = self._plan_running(chunks)
            # After a preemption nothing is admitted in the same step: it would take the blocks just won.
            if self.num_preemptions == preemptions:
                fetches = self._admit(chunks, budget, now)
        except _StepsUnderWay:
            chunks = []  # the next plan, after their commits, can preempt
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_scheduled = chunk.start + chunk.count
            sequence.num_unread += chunk.draws
            sequence.num_steps += 1
        return StepPlan(chunks, fetches, self._live.take_ended())

    def commit(self, plan: StepPlan, drawn: list[Drawn | str], now: float) -> Commit:
        """Take in what the step computed: for each chunk that draws, in order, its token, or why there is none."""
        events: list[TokenEvent] = []
        offers: list[Offer] = []
        tokens = iter(drawn)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_steps -= 1
            token = next(tokens) if chunk.draws else None
            if sequence.status is not Status.RUNNING:
                self._live.leave(sequence)
                continue
            sequence.num_computed = chunk.start + chunk.count
            self._live.publish(sequence)
            if token is not None:
                sequence.num_unread -= 1
                self._outcomes.take(sequence, token, now, events, offers)
        return Commit(events + self._live.take_ended(), offers)

    def _admit(self, chunks: list[Chunk], budget: int, now: float) -> list[Fetch]:
        fetches: list[Fetch] = []
        if not self._live.waiting:
            return fetches  # to ask all the others what they may need takes a while
        promised = self._live.promised()
        for sequence in list(self._live.waiting.values()):
            if len(self._live.running) + len(self._live.fetching) >= self.limits.max_batch_size:
                break
            if budget <= 0 and not sequence.use_ticket:
                break
            matched = self._admission.match(sequence)
            if self._live.someone_computes_next(sequence, len(matched)):
                continue  # a moment later its prefix is in the cache
            if not self._admission.fits(sequence, matched, promised):
                break  # first come, first served: later ones must not starve it
            self._admission.start(sequence, matched, now)
            promised += self._live.max_blocks(sequence) - len(sequence.blocks)
            if sequence.use_ticket:
                fetches.append(self._admission.start_fetch(sequence, len(matched)))
                continue
            budget = self._plan_chunk(sequence, chunks, budget)
        return fetches

    def _plan_running(self, chunks: list[Chunk]) -> int:
        budget = self.limits.max_num_tokens
        # Sequences that are drawing tokens come first: a long prompt must not stall them.
        for sequence in sorted(self._live.running.values(), key=lambda sequence: sequence.num_pending > 1):
            if budget <= 0:
                break
            # Not preempted by an earlier one, and not over with what is under way.
            if sequence.status is Status.RUNNING and not self._is_last_unread(sequence):
                budget = self._plan_chunk(sequence, chunks, budget)
        return budget

    def _plan_chunk(self, sequence: Sequence, chunks: list[Chunk], budget: int) -> int:
        count = min(sequence.num_pending, budget)
        if sequence.tells_prompt:
            count = min(count, self._telling_budget)
            if count == 0:
                return budget
        needed = self._live.blocks_for(sequence.num_scheduled + count) - len(sequence.blocks)
        if needed > 0:
            new = self.pool.allocate(needed)
            while new is None and self._preempt_after(sequence, chunks):
                new = self.pool.allocate(needed)
            if new is None:
                self._preempt(sequence)
                return budget
            sequence.blocks += new
        if sequence.tells_prompt:
            self._telling_budget -= count
        start = sequence.num_scheduled
        chunks.append(Chunk(sequence, start, count, draws=start + count == sequence.num_known))
        return budget - count

    def _preempt_after(self, sequence: Sequence, chunks: list[Chunk]) -> bool:
        """Take the blocks of the latest admitted sequence, if that is not `sequence` and not in this step already."""
        planned = {chunk.sequence.id for chunk in chunks}
        for victim in reversed(self._live.running.values()):
            if victim is sequence:
                return False
            if victim.id not in planned:
                self._preempt(victim)
                return True
        return False

    def _is_last_unread(self, sequence: Sequence) -> bool:
        """Whether a token that is not read yet ends the sequence, whatever it is."""
        request, unread = sequence.request, sequence.num_unread
        if not unread:
            return False
        if request.request_type == "context_only":
            return True
        at_most = min(sequence.num_prompt + request.params.max_tokens, self.limits.max_seq_len)
        return sequence.num_known >= at_most

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.num_steps:
            raise _StepsUnderWay
        self.num_preemptions += 1
        self._live.wait_again(sequence)


def _error_event(sequence: Sequence, message: str, status: int) -> TokenEvent:
    return TokenEvent(request_id=sequence.id, finish_reason="error", error=message, error_status=status)
