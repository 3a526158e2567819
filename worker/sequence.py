"""The state of one sequence, from its arrival to its one terminal event.

WAITING ──> RUNNING ──> FINISHED
   │  ▲        │
   ▼  └────────┘ preempted
FETCHING ──> RUNNING          its prompt's KV is on the way
   │
   └──> DRAINING ──> FINISHED ended while a copy or a step may still write into its blocks
"""

import enum
from dataclasses import dataclass, field

from diptych.block_hash import first_parent, hash_block
from diptych.wire import Logprob, SequenceTimes, Submit


class Status(enum.Enum):
    WAITING = enum.auto()
    FETCHING = enum.auto()
    RUNNING = enum.auto()
    DRAINING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens[:num_computed]` have their KV in `blocks`; the rest is what the next steps must compute.

    Steps may be under way: when they are done, `num_scheduled` tokens have their KV, and `num_unread` more tokens are
    known than now.
    """

    request: Submit
    arrival: float  # the scheduler's clock, seconds
    queued_at: float = field(init=False)  # later than `arrival` when its prefill had to be waited for
    tokens: list[int] = field(init=False)
    status: Status = Status.WAITING
    num_computed: int = 0
    num_scheduled: int = 0
    num_unread: int = 0
    num_steps: int = 0  # under way
    num_cached: int | None = None  # prompt tokens found in the prefix cache at the first admission
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, as far as needed yet
    num_published: int = 0
    use_ticket: bool = field(init=False)
    scheduled_at: float | None = None
    fetched_at: float | None = None
    fetch_times: SequenceTimes | None = None
    first_token_sent: bool = False
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # the runner adds those of each chunk

    def __post_init__(self) -> None:
        self.queued_at = self.arrival
        self.tokens = [*self.request.prompt_token_ids, *self.request.output_token_ids]
        self.use_ticket = self.request.ticket is not None

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def tells_prompt(self) -> bool:
        """Whether the log probabilities of the prompt's tokens are wanted and not told yet."""
        is_second_leg = self.request.request_type == "generation_only"
        return self.request.params.prompt_logprobs and not self.first_token_sent and not is_second_leg

    @property
    def num_known(self) -> int:
        """Tokens, those included that steps under way draw."""
        return len(self.tokens) + self.num_unread

    @property
    def num_pending(self) -> int:
        """Known tokens whose KV no step computes yet."""
        return self.num_known - self.num_scheduled

    def start_at(self, num_computed: int) -> None:
        """So many tokens have their KV in `blocks`, and no step is under way."""
        self.num_computed = self.num_scheduled = num_computed

    @property
    def deadline(self) -> float | None:
        timeout_s = self.request.timeout_s
        return None if timeout_s is None else self.arrival + timeout_s

    def content_hash(self) -> bytes:
        """Of the whole prompt: what two engines compare before one takes the other's KV for it."""
        return content_hash(self.request.prompt_token_ids, self.request.cache_salt)

    def parent_hash(self, index: int) -> bytes:
        """What the hash of the block at `index` builds on."""
        return self.hashes[index - 1] if index else first_parent(self.request.cache_salt)

    def extend_hashes(self, tokens_per_block: int, num_tokens: int) -> None:
        """Hash the full blocks of ``tokens[:num_tokens]`` that have no hash yet."""
        for start in range(len(self.hashes) * tokens_per_block, num_tokens, tokens_per_block):
            end = start + tokens_per_block
            if end > num_tokens:
                break
            self.hashes.append(hash_block(self.parent_hash(len(self.hashes)), self.tokens[start:end]))


def content_hash(prompt_token_ids: list[int], cache_salt: str) -> bytes:
    return hash_block(first_parent(cache_salt), prompt_token_ids)
