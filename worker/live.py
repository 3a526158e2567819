"""The sequences that have not ended, by what they wait for, and the blocks that each holds.

Keeps blocks and sequences in step: a sequence that leaves gives its blocks back, no later and no earlier than nobody
writes into them. Decides nothing about what runs next.
"""

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

from diptych.wire import FinishReason, TokenEvent
from diptych.worker.blocks import BlockPool
from diptych.worker.plan import SchedulerLimits
from diptych.worker.sequence import Sequence, Status


class LiveSequences:
    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self._limits = limits
        self._pool = pool
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.fetching: dict[str, Sequence] = {}
        self.running: OrderedDict[str, Sequence] = OrderedDict()  # in order of admission
        self.ended: list[TokenEvent] = []
        self._leaving: set[Sequence] = set()  # ended, and steps with them are under way
        self._computing: dict[bytes, Sequence] = {}  # prompt blocks on their way into the prefix cache

    def find(self, request_id: str) -> Sequence | None:
        for group in (self.waiting, self.fetching, self.running):
            if request_id in group:
                return group[request_id]
        return None

    def run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        self.running[sequence.id] = sequence

    def wait_again(self, sequence: Sequence) -> None:
        """Without its blocks, before all others."""
        self.drop_blocks(sequence)
        self.running.pop(sequence.id, None)
        sequence.status = Status.WAITING
        sequence.start_at(0)
        sequence.prompt_logprobs = []
        self.waiting[sequence.id] = sequence
        self.waiting.move_to_end(sequence.id, last=False)

    def take_ended(self) -> list[TokenEvent]:
        """Of what ended since the last call."""
        events, self.ended = self.ended, []
        return events

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.tokens_per_block)

    def max_blocks(self, sequence: Sequence) -> int:
        """Blocks that the sequence can need in its life. The last token's KV is never computed."""
        request = sequence.request
        new = 1 if request.request_type == "context_only" else request.params.max_tokens
        num_tokens = min(max(sequence.num_prompt + new, len(sequence.tokens)), self._limits.max_seq_len) - 1
        return self.blocks_for(num_tokens)

    def promised(self) -> int:
        """Blocks that the admitted sequences can still ask for."""
        return sum(
            self.max_blocks(sequence) - len(sequence.blocks)
            for sequence in (*self.running.values(), *self.fetching.values())
        )

    def expect(self, sequence: Sequence, hashes: SequenceOf[bytes]) -> None:
        """It will compute the blocks of these hashes, unless somebody does already."""
        for block_hash in hashes:
            self._computing.setdefault(block_hash, sequence)

    def someone_computes_next(self, sequence: Sequence, num_matched: int) -> bool:
        if num_matched >= len(sequence.hashes):
            return False
        return self._computing.get(sequence.hashes[num_matched], sequence) is not sequence

    def publish(self, sequence: Sequence) -> None:
        size = self._limits.tokens_per_block
        sequence.extend_hashes(size, sequence.num_computed)
        for index in range(sequence.num_published, sequence.num_computed // size):
            publish_block(self._pool, sequence, index, sequence.blocks[index], size)
            block_hash = sequence.hashes[index]
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
        sequence.num_published = max(sequence.num_published, sequence.num_computed // size)

    def expire(self, now: float) -> None:
        for sequence in (*self.waiting.values(), *self.fetching.values(), *self.running.values()):
            if sequence.deadline is not None and now >= sequence.deadline:
                seconds = sequence.request.timeout_s
                self.end(
                    sequence, "timeout", error=f"no answer within the request's {seconds:g} s", status=504
                )

    def end(
        self, sequence: Sequence, reason: FinishReason, *, error: str | None = None, status: int = 500
    ) -> None:
        if sequence.status is Status.DRAINING:
            return
        self.ended.append(
            TokenEvent(request_id=sequence.id, finish_reason=reason, error=error, error_status=status)
        )
        if sequence.status is Status.FETCHING:
            sequence.status = Status.DRAINING  # blocks come back when the copy has let go of them
        else:
            self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        self.waiting.pop(sequence.id, None)
        self.running.pop(sequence.id, None)
        sequence.status = Status.DRAINING
        self._leaving.add(sequence)
        self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The end, unless a step under way still writes into the blocks."""
        if not sequence.num_steps:
            self._leaving.remove(sequence)
            self.drop_blocks(sequence)
            sequence.status = Status.FINISHED

    def drop_blocks(self, sequence: Sequence) -> None:
        for block_hash in sequence.hashes[sequence.num_published :]:
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_published = 0

    def leave_fetching(self, request_id: str) -> Sequence | None:
        """The sequence whose copy has ended, or None if it was aborted meanwhile."""
        sequence = self.fetching.pop(request_id)
        if sequence.status is Status.DRAINING:
            self.forget(sequence)
            return None
        return sequence

    def check(self, others: SequenceOf[int] = ()) -> None:
        """Raise AssertionError unless blocks are conserved and owned as the sequences say, or by `others`."""
        self._pool.check()
        held = dict.fromkeys(others, 1)
        groups = (self.waiting, self.fetching, self.running)
        for sequence in (*self._leaving, *(sequence for group in groups for sequence in group.values())):
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        assert len(held) == self._pool.counts().active, "active blocks without a sequence"
        assert all(not sequence.blocks for sequence in self.waiting.values())


def publish_block(pool: BlockPool, sequence: Sequence, index: int, block: int, tokens_per_block: int) -> None:
    """`block` holds the KV of the sequence's full block number `index`: others may use it from now on."""
    block_hash = sequence.hashes[index]
    is_new = pool.publish(block, block_hash)
    recorder = pool.recorder
    if is_new and recorder is not None and recorder.with_tokens:
        tokens = sequence.tokens[index * tokens_per_block : (index + 1) * tokens_per_block]
        recorder.describe(block_hash, sequence.parent_hash(index), tokens)
