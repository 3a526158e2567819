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

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from diptych.errors import ContextLengthExceeded, DiptychError, InvalidRequest
from diptych.wire import FinishReason, Logprob, SequenceTimes, Submit, TokenEvent
from diptych.worker.blocks import BlockPool
from diptych.worker.sequence import Sequence, Status

# A row of logits is a vocabulary of floats: so many of them fit beside the model.
_MAX_TELLING = 256

CapacityPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_batch_size: int  # sequences in one step
    max_num_tokens: int  # tokens in one step
    max_seq_len: int  # prompt and output of one sequence
    tokens_per_block: int
    capacity_policy: CapacityPolicy = "GUARANTEED_NO_EVICT"
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute ``sequence.tokens[start : start + count]``; draw a token if that closes the gap.

    The last of these tokens may be what a step under way draws.
    """

    sequence: Sequence
    start: int
    count: int
    draws: bool

    @property
    def num_telling(self) -> int:
        """Rows, from the chunk's first on, whose logits are wanted for the prompt token after each."""
        if not self.sequence.tells_prompt:
            return 0
        return max(0, min(self.start + self.count, self.sequence.num_prompt - 1) - self.start)


@dataclass(frozen=True, slots=True)
class Fetch:
    """Copy the ticket's blocks `source_indices` (positions in its list) into `destination_blocks`."""

    sequence: Sequence
    source_indices: range
    destination_blocks: list[int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    chunks: list[Chunk] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One chunk's token."""

    token_id: int
    logprob: Logprob | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """The sequence's prompt is computed and its blocks are leased: give `event` a ticket for them."""

    sequence: Sequence
    blocks: list[int]
    event: TokenEvent


@dataclass(frozen=True, slots=True)
class Commit:
    events: list[TokenEvent]
    offers: list[Offer]


class _StepsUnderWay(Exception):
    """What would have to be preempted is in a step that is not committed yet."""


class Scheduler:
    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._fetching: dict[str, Sequence] = {}
        self._running: OrderedDict[str, Sequence] = OrderedDict()  # in order of admission
        self._leaving: set[Sequence] = set()  # ended, and steps with them are under way
        self._computing: dict[bytes, Sequence] = {}  # prompt blocks on their way into the prefix cache
        self._ended: list[TokenEvent] = []
        self._telling_budget = 0  # tokens left in this step for prompts that tell their logits

    # What happened

    def add(self, request: Submit, now: float, *, arrival: float | None = None) -> None:
        """Queue one sequence. What can never run ends at once with an error event.

        `arrival`: what its deadline counts from, when that is not `now`.
        """
        sequence = Sequence(request, now if arrival is None else arrival)
        sequence.queued_at = now
        try:
            self._validate(sequence)
        except DiptychError as error:
            self._ended.append(_error_event(sequence, error.message, error.status))
            return
        self._waiting[sequence.id] = sequence

    def abort(self, request_id: str) -> None:
        """End a sequence as cancelled. Unknown ids are ignored: it may have finished already."""
        sequence = self._find(request_id)
        if sequence is not None:
            self._end(sequence, "cancelled")

    def fetch_done(self, request_id: str, times: SequenceTimes, now: float) -> None:
        sequence = self._leave_fetching(request_id)
        if sequence is not None:
            sequence.start_at(sequence.num_prompt)
            sequence.fetched_at = now
            sequence.fetch_times = times
            self._publish(sequence)
            self._run(sequence)

    def fetch_failed(self, request_id: str, times: SequenceTimes, now: float) -> None:
        """The prompt's KV will not come: the sequence computes it like any other."""
        sequence = self._leave_fetching(request_id)
        if sequence is not None:
            sequence.fetched_at = now
            sequence.fetch_times = times
            self._run(sequence)

    def unlease(self, blocks: SequenceOf[int]) -> None:
        self.pool.unlease(blocks)

    # The step

    @property
    def has_work(self) -> bool:
        """Whether `plan` should be called again without waiting for an event."""
        return bool(self._running or self._waiting or self._ended)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def prefills(self) -> list[int]:
        """Of each running sequence whose prompt is not computed, how many tokens of it are left."""
        left = (sequence.num_prompt - sequence.num_computed for sequence in self._running.values())
        return [count for count in left if count > 0]

    @property
    def num_fetching(self) -> int:
        return len(self._fetching)

    @property
    def num_spare_blocks(self) -> int:
        """Blocks that nobody waits for and no admitted sequence will need."""
        return 0 if self._waiting else max(0, self.pool.num_available - self._promised())

    def plan(self, now: float) -> StepPlan:
        self._expire(now)
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
        events, self._ended = self._ended, []
        return StepPlan(chunks, fetches, events)

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
                self._leave(sequence)
                continue
            sequence.num_computed = chunk.start + chunk.count
            self._publish(sequence)
            if token is not None:
                sequence.num_unread -= 1
                self._commit_token(sequence, token, now, events, offers)
        ended, self._ended = self._ended, []
        return Commit(events + ended, offers)

    def check(self, others: SequenceOf[int] = ()) -> None:
        """Raise AssertionError unless blocks are conserved and owned as the sequences say, or by `others`."""
        self.pool.check()
        held = dict.fromkeys(others, 1)
        groups = (self._waiting, self._fetching, self._running)
        for sequence in (*self._leaving, *(sequence for group in groups for sequence in group.values())):
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        assert len(held) == self.pool.counts().active, "active blocks without a sequence"
        assert all(not sequence.blocks for sequence in self._waiting.values())

    # Admission

    def _validate(self, sequence: Sequence) -> None:
        request, limit = sequence.request, self.limits.max_seq_len
        if not request.prompt_token_ids:
            raise InvalidRequest("prompt is empty: at least one token is needed", param="prompt")
        if request.request_type == "generation_only" and not request.output_token_ids:
            raise InvalidRequest(
                "first_gen_tokens is empty: a generation leg needs the token that the context leg drew",
                param="disaggregated_params",
            )
        if len(sequence.tokens) >= limit:
            raise ContextLengthExceeded(
                f"the prompt has {len(sequence.tokens)} tokens; this model takes at most {limit - 1} "
                f"and one token of output (max_seq_len {limit})",
                param="prompt",
            )
        if sequence.id in self._waiting or sequence.id in self._running or sequence.id in self._fetching:
            raise InvalidRequest(f"request id {sequence.id} is in use", param="request_id")

    def _max_blocks(self, sequence: Sequence) -> int:
        """Blocks that the sequence can need in its life. The last token's KV is never computed."""
        request = sequence.request
        new = 1 if request.request_type == "context_only" else request.params.max_tokens
        num_tokens = min(max(sequence.num_prompt + new, len(sequence.tokens)), self.limits.max_seq_len) - 1
        return self._blocks_for(num_tokens)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.tokens_per_block)

    def _admit(self, chunks: list[Chunk], budget: int, now: float) -> list[Fetch]:
        fetches: list[Fetch] = []
        promised = self._promised()
        for sequence in list(self._waiting.values()):
            if len(self._running) + len(self._fetching) >= self.limits.max_batch_size:
                break
            if budget <= 0 and not sequence.use_ticket:
                break
            matched = self._match(sequence)
            if self._someone_computes_next(sequence, len(matched)):
                continue  # a moment later its prefix is in the cache
            if not self._fits(sequence, matched, promised):
                break  # first come, first served: later ones must not starve it
            self._start(sequence, matched, now)
            promised += self._max_blocks(sequence) - len(sequence.blocks)
            if sequence.use_ticket:
                fetches.append(self._start_fetch(sequence, len(matched)))
                continue
            budget = self._plan_chunk(sequence, chunks, budget)
        return fetches

    def _promised(self) -> int:
        """Blocks that the admitted sequences can still ask for."""
        return sum(
            self._max_blocks(sequence) - len(sequence.blocks)
            for sequence in (*self._running.values(), *self._fetching.values())
        )

    def _match(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix. One known token must be left to compute."""
        size = self.limits.tokens_per_block
        sequence.extend_hashes(size, len(sequence.tokens))
        if sequence.tells_prompt:
            return []  # logits are not in the cache
        return self.pool.match(sequence.hashes[: (len(sequence.tokens) - 1) // size])

    def _someone_computes_next(self, sequence: Sequence, num_matched: int) -> bool:
        if num_matched >= len(sequence.hashes):
            return False
        return self._computing.get(sequence.hashes[num_matched], sequence) is not sequence

    def _fits(self, sequence: Sequence, matched: list[int], promised: int) -> bool:
        shared = sum(self.pool.is_active(block) for block in matched)
        if self.limits.capacity_policy == "GUARANTEED_NO_EVICT":
            return self._max_blocks(sequence) - shared <= self.pool.num_available - promised
        now = self._blocks_for(min(len(sequence.tokens), self.limits.max_num_tokens))
        if sequence.use_ticket:
            now = self._blocks_for(sequence.num_prompt)
        return now - shared <= self.pool.num_available

    def _start(self, sequence: Sequence, matched: list[int], now: float) -> None:
        size = self.limits.tokens_per_block
        self.pool.take(matched)
        sequence.blocks = list(matched)
        sequence.start_at(len(matched) * size)
        sequence.num_published = len(matched)
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            self.num_prompt_tokens += sequence.num_prompt
            self.num_cached_tokens += sequence.num_cached
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
        del self._waiting[sequence.id]
        for block_hash in sequence.hashes[len(matched) :]:
            self._computing.setdefault(block_hash, sequence)
        if not sequence.use_ticket:
            self._run(sequence)

    def _start_fetch(self, sequence: Sequence, num_matched: int) -> Fetch:
        sequence.use_ticket = False  # tried once; afterwards it is a sequence like any other
        sequence.status = Status.FETCHING
        self._fetching[sequence.id] = sequence
        needed = self._blocks_for(sequence.num_prompt)
        new = self.pool.allocate(max(0, needed - num_matched))
        assert new is not None, "_fits promised these blocks"
        sequence.blocks += new
        return Fetch(sequence, range(num_matched, needed), new)

    # Running sequences

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        self._running[sequence.id] = sequence

    def _plan_running(self, chunks: list[Chunk]) -> int:
        budget = self.limits.max_num_tokens
        # Sequences that are drawing tokens come first: a long prompt must not stall them.
        for sequence in sorted(self._running.values(), key=lambda sequence: sequence.num_pending > 1):
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
        needed = self._blocks_for(sequence.num_scheduled + count) - len(sequence.blocks)
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
        for victim in reversed(self._running.values()):
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
        self._drop_blocks(sequence)
        self._running.pop(sequence.id, None)
        sequence.status = Status.WAITING
        sequence.start_at(0)
        sequence.prompt_logprobs = []
        self._waiting[sequence.id] = sequence
        self._waiting.move_to_end(sequence.id, last=False)

    def _publish(self, sequence: Sequence) -> None:
        size = self.limits.tokens_per_block
        sequence.extend_hashes(size, sequence.num_computed)
        for index in range(sequence.num_published, sequence.num_computed // size):
            publish_block(self.pool, sequence, index, sequence.blocks[index], size)
            block_hash = sequence.hashes[index]
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
        sequence.num_published = max(sequence.num_published, sequence.num_computed // size)

    # Endings

    def _commit_token(
        self,
        sequence: Sequence,
        drawn: "Drawn | str",
        now: float,
        events: list[TokenEvent],
        offers: list[Offer],
    ) -> None:
        if isinstance(drawn, str):
            self._end(sequence, "error", error=drawn)
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
            stop_token_id=None if stop_token in self.limits.eos_token_ids else stop_token,
            num_cached_tokens=None if sequence.first_token_sent else sequence.num_cached,
            times=None if sequence.first_token_sent else _times(sequence, now),
        )
        sequence.first_token_sent = True
        if finish_reason is None and sequence.request.request_type == "context_only":
            blocks = list(sequence.blocks)
            self.pool.lease(blocks)
            self._forget(sequence)
            offers.append(Offer(sequence, blocks, event))
            return
        if finish_reason is not None:
            self._forget(sequence)
        events.append(event)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        params = sequence.request.params
        if sequence.num_outputs >= params.min_tokens:
            if token_id in params.stop_token_ids:
                return "stop"
            if token_id in self.limits.eos_token_ids and not params.ignore_eos:
                return "stop"
        if sequence.num_outputs >= params.max_tokens or len(sequence.tokens) >= self.limits.max_seq_len:
            return "length"
        return None

    def _expire(self, now: float) -> None:
        for sequence in (*self._waiting.values(), *self._fetching.values(), *self._running.values()):
            deadline = sequence.deadline
            if deadline is not None and now >= deadline and sequence.status is not Status.DRAINING:
                seconds = sequence.request.timeout_s
                self._end(
                    sequence, "timeout", error=f"no answer within the request's {seconds:g} s", status=504
                )

    def _end(
        self, sequence: Sequence, reason: FinishReason, *, error: str | None = None, status: int = 500
    ) -> None:
        if sequence.status is Status.DRAINING:
            return
        self._ended.append(
            TokenEvent(request_id=sequence.id, finish_reason=reason, error=error, error_status=status)
        )
        if sequence.status is Status.FETCHING:
            sequence.status = Status.DRAINING  # blocks come back when the copy has let go of them
        else:
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._waiting.pop(sequence.id, None)
        self._running.pop(sequence.id, None)
        sequence.status = Status.DRAINING
        self._leaving.add(sequence)
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """The end, unless a step under way still writes into the blocks."""
        if not sequence.num_steps:
            self._leaving.remove(sequence)
            self._drop_blocks(sequence)
            sequence.status = Status.FINISHED

    def _drop_blocks(self, sequence: Sequence) -> None:
        for block_hash in sequence.hashes[sequence.num_published :]:
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_published = 0

    def _leave_fetching(self, request_id: str) -> Sequence | None:
        """The sequence whose copy has ended, or None if it was aborted meanwhile."""
        sequence = self._fetching.pop(request_id)
        if sequence.status is Status.DRAINING:
            self._forget(sequence)
            return None
        return sequence

    def _find(self, request_id: str) -> Sequence | None:
        for group in (self._waiting, self._fetching, self._running):
            if request_id in group:
                return group[request_id]
        return None

    def is_fetching(self, request_id: str) -> bool:
        return request_id in self._fetching


def publish_block(pool: BlockPool, sequence: Sequence, index: int, block: int, tokens_per_block: int) -> None:
    """`block` holds the KV of the sequence's full block number `index`: others may use it from now on."""
    block_hash = sequence.hashes[index]
    is_new = pool.publish(block, block_hash)
    recorder = pool.recorder
    if is_new and recorder is not None and recorder.with_tokens:
        tokens = sequence.tokens[index * tokens_per_block : (index + 1) * tokens_per_block]
        recorder.describe(block_hash, sequence.parent_hash(index), tokens)


def _times(sequence: Sequence, now: float) -> SequenceTimes:
    scheduled = now if sequence.scheduled_at is None else sequence.scheduled_at
    ready = scheduled if sequence.fetched_at is None else sequence.fetched_at
    fetch = sequence.fetch_times
    return SequenceTimes(
        follow_s=sequence.queued_at - sequence.arrival,
        queue_s=scheduled - sequence.queued_at,
        fetch_s=ready - scheduled,
        prefill_s=now - ready,
        wire_s=fetch.wire_s if fetch else 0.0,
        wire_bytes=fetch.wire_bytes if fetch else 0,
        transport=fetch.transport if fetch else "",
        ready_at=ready,
        drawn_at=now,
    )


def _error_event(sequence: Sequence, message: str, status: int) -> TokenEvent:
    return TokenEvent(request_id=sequence.id, finish_reason="error", error=message, error_status=status)
