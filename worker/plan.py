"""The words between scheduler and runner: what a step computes, what it drew, and what becomes of that.

Plain values; they know nothing of how a plan is made.
"""

from dataclasses import dataclass, field
from typing import Literal

from diptych.wire import Logprob, TokenEvent
from diptych.worker.sequence import Sequence

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
