"""Which waiting sequences may start, in their order, and with which blocks."""

from diptych.errors import ContextLengthExceeded, InvalidRequest
from diptych.worker.blocks import BlockPool
from diptych.worker.live import LiveSequences
from diptych.worker.plan import Fetch, SchedulerLimits
from diptych.worker.sequence import Sequence, Status


class Admission:
    def __init__(self, limits: SchedulerLimits, pool: BlockPool, live: LiveSequences) -> None:
        self._limits = limits
        self._pool = pool
        self._live = live
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    def validate(self, sequence: Sequence) -> None:
        request, limit = sequence.request, self._limits.max_seq_len
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
        if self._live.find(sequence.id) is not None:
            raise InvalidRequest(f"request id {sequence.id} is in use", param="request_id")

    def match(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix. One known token must be left to compute."""
        size = self._limits.tokens_per_block
        sequence.extend_hashes(size, len(sequence.tokens))
        if sequence.tells_prompt:
            return []  # logits are not in the cache
        return self._pool.match(sequence.hashes[: (len(sequence.tokens) - 1) // size])

    def fits(self, sequence: Sequence, matched: list[int], promised: int) -> bool:
        shared = sum(self._pool.is_active(block) for block in matched)
        if self._limits.capacity_policy == "GUARANTEED_NO_EVICT":
            return self._live.max_blocks(sequence) - shared <= self._pool.num_available - promised
        now = self._live.blocks_for(min(len(sequence.tokens), self._limits.max_num_tokens))
        if sequence.use_ticket:
            now = self._live.blocks_for(sequence.num_prompt)
        return now - shared <= self._pool.num_available

    def start(self, sequence: Sequence, matched: list[int], now: float) -> None:
        size = self._limits.tokens_per_block
        self._pool.take(matched)
        sequence.blocks = list(matched)
        sequence.start_at(len(matched) * size)
        sequence.num_published = len(matched)
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            self.num_prompt_tokens += sequence.num_prompt
            self.num_cached_tokens += sequence.num_cached
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
        del self._live.waiting[sequence.id]
        self._live.expect(sequence, sequence.hashes[len(matched) :])
        if not sequence.use_ticket:
            self._live.run(sequence)

    def start_fetch(self, sequence: Sequence, num_matched: int) -> Fetch:
        sequence.use_ticket = False  # tried once; afterwards it is a sequence like any other
        sequence.status = Status.FETCHING
        self._live.fetching[sequence.id] = sequence
        needed = self._live.blocks_for(sequence.num_prompt)
        new = self._pool.allocate(max(0, needed - num_matched))
        assert new is not None, "`fits` promised these blocks"
        sequence.blocks += new
        return Fetch(sequence, range(num_matched, needed), new)
