"""A scheduler driven with a fake model whose KV is checkable: each block slot remembers the tokens before it."""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from diptych.wire import Logprob, SamplingParams, SequenceTimes, Submit, TokenEvent
from diptych.worker.blocks import BlockPool
from diptych.worker.plan import Drawn, Fetch, SchedulerLimits, StepPlan
from diptych.worker.scheduler import Scheduler
from diptych.worker.sequence import Sequence

VOCAB = 50


def next_token(tokens: list[int]) -> int:
    """What the fake model says after `tokens`: a function of all of them."""
    return hashlib.blake2b(bytes(tokens), digest_size=2).digest()[0] % VOCAB


def prefix_digest(tokens: list[int]) -> bytes:
    return hashlib.blake2b(bytes(tokens), digest_size=4).digest()


def reference(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class Simulation:
    num_blocks: int = 12
    tokens_per_block: int = 4
    max_num_tokens: int = 9
    max_batch_size: int = 4
    max_seq_len: int = 40
    policy: str = "GUARANTEED_NO_EVICT"
    overlap: bool = False  # a plan is made before the last one is committed
    now: float = 0.0
    events: dict[str, list[TokenEvent]] = field(default_factory=dict)
    fetches: list[Fetch] = field(default_factory=list)
    leases: list[list[int]] = field(default_factory=list)
    telling: list[int] = field(default_factory=list)  # rows of each step that told of a prompt
    held_elsewhere: Callable[[], list[int]] = list  # active blocks that belong to no sequence
    under_way: tuple[StepPlan, list[Drawn]] | None = None
    unread: dict[Sequence, list[int]] = field(default_factory=dict)  # drawn on the device, not committed

    def __post_init__(self) -> None:
        limits = SchedulerLimits(
            max_batch_size=self.max_batch_size,
            max_num_tokens=self.max_num_tokens,
            max_seq_len=self.max_seq_len,
            tokens_per_block=self.tokens_per_block,
            capacity_policy=self.policy,  # type: ignore[arg-type]
        )
        self.scheduler = Scheduler(limits, BlockPool(self.num_blocks))
        # kv[block][slot] = digest of the tokens up to and including the slot's
        self.kv: list[list[bytes | None]] = [[None] * self.tokens_per_block for _ in range(self.num_blocks)]

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int = 5,
        *,
        tells: bool = False,
        stop: int = VOCAB,
        **fields: object,
    ) -> None:
        """`tells`: with the prompt's log probabilities."""
        self.events[request_id] = []
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, prompt_logprobs=tells, stop_token_ids=(stop,)
        )
        submit = Submit(request_id=request_id, prompt_token_ids=prompt, params=params, **fields)  # type: ignore[arg-type]
        self.scheduler.add(submit, self.now)

    def step(self) -> int:
        self.now += 1
        plan = self.scheduler.plan(self.now)
        self._collect(plan.events)
        self.fetches += plan.fetches
        assert sum(chunk.count for chunk in plan.chunks) <= self.max_num_tokens
        self.telling.append(sum(chunk.num_telling for chunk in plan.chunks))
        before, self.under_way = self.under_way, (plan, self._compute(plan))
        if before is not None:
            self._commit(*before)
        if not self.overlap or not plan.chunks:
            self._commit(*self.under_way)
            self.under_way = None
        self.scheduler.check(self.held_elsewhere())
        return len(plan.chunks)

    def _compute(self, plan: StepPlan) -> list[Drawn]:
        drawn = []
        for chunk in plan.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            unread = self.unread.setdefault(sequence, [])
            tokens = [*sequence.tokens, *unread]
            assert end <= len(tokens) and chunk.draws == (end == len(tokens))
            for position in range(end):
                block, slot = divmod(position, self.tokens_per_block)
                digest = prefix_digest(tokens[: position + 1])
                if position >= chunk.start:
                    self.kv[sequence.blocks[block]][slot] = digest
                assert self.kv[sequence.blocks[block]][slot] == digest, "foreign or missing KV"
            for token in sequence.tokens[chunk.start + 1 :][: chunk.num_telling]:
                sequence.prompt_logprobs.append(Logprob(token, 0.0))
            if chunk.draws:
                unread.append(next_token(tokens))
                drawn.append(Drawn(unread[-1]))
        return drawn

    def _commit(self, plan: StepPlan, drawn: list[Drawn]) -> None:
        for chunk in plan.chunks:
            if chunk.draws:
                self.unread[chunk.sequence].pop(0)
        commit = self.scheduler.commit(plan, drawn, self.now)
        self._collect(commit.events)
        for offer in commit.offers:
            self.leases.append(offer.blocks)
            self._collect([offer.event])

    def land(self, fetch: Fetch) -> None:
        """The copy arrived: write the KV that the context worker would have computed."""
        self.write(fetch.sequence.request.prompt_token_ids, fetch.source_indices, fetch.destination_blocks)
        self.scheduler.fetch_done(fetch.sequence.id, SequenceTimes(), self.now)

    def write(self, tokens: list[int], indices: Iterable[int], blocks: Iterable[int]) -> None:
        for index, block in zip(indices, blocks, strict=True):
            start = index * self.tokens_per_block
            for slot, position in enumerate(range(start, min(start + self.tokens_per_block, len(tokens)))):
                self.kv[block][slot] = prefix_digest(tokens[: position + 1])

    def fail(self, fetch: Fetch, held: Iterable[int] = ()) -> None:
        self.scheduler.fetch_failed(fetch.sequence.id, SequenceTimes(), self.now, held=list(held))

    def run(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work and self.under_way is None:
                return
            self.step()
        raise AssertionError("the scheduler did not come to rest")

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.events[request_id] for token in event.token_ids]

    def told(self, request_id: str) -> list[int] | None:
        """The prompt's tokens whose log probabilities came, with the first token."""
        first, *others = [event for event in self.events[request_id] if event.token_ids]
        assert all(event.prompt_logprobs is None for event in others)
        return None if first.prompt_logprobs is None else [entry.token_id for entry in first.prompt_logprobs]

    def reason(self, request_id: str) -> str | None:
        reasons = [event.finish_reason for event in self.events[request_id] if event.finish_reason]
        assert len(reasons) <= 1, "two terminal events"
        return reasons[0] if reasons else None

    def _collect(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].append(event)


def random_prompt(rng: random.Random, low: int, high: int) -> list[int]:
    # Few distinct starts, so that prefixes are shared.
    start = [rng.randrange(3)] * rng.randrange(0, 12)
    return (start + [rng.randrange(VOCAB) for _ in range(rng.randrange(low, high))])[:high] or [1]
