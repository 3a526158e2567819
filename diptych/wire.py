"""What our own processes say to each other.

Router and workers speak HTTP (see docs/protocol.md); a worker's HTTP process and its engine process speak
the messages below, msgpack over ZeroMQ. Times are seconds; token ids are ints of the model's vocabulary.
"""

from typing import Any, Literal

import msgspec

Role = Literal["CONTEXT", "GENERATION", "BOTH"]
RequestType = Literal["context_and_generation", "context_only", "generation_only"]
FinishReason = Literal["stop", "length", "cancelled", "error", "timeout"]
WorkerState = Literal["STARTING", "READY", "DRAINING"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to draw the tokens of one sequence. `seed` is always set: the edge draws one when the user gives none."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: dict[int, float] = {}
    num_logprobs: int | None = None  # None: off; n: the chosen token's and the n most likely ones'
    prompt_logprobs: bool = False  # those of the prompt's tokens, too; needs num_logprobs
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class Submit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit"):
    """HTTP process to engine: one sequence to run. Stop strings stay with the HTTP process, which owns the text.

    ``context_only``: compute the prompt, draw one token, hold the KV blocks and answer with a ticket.
    ``generation_only``: `output_token_ids` were drawn elsewhere (at least one); fetch the prompt's KV with
    `ticket`, or compute it when that fails or when there is no ticket, and go on. With `owner` set there are neither
    tokens nor a ticket yet: both come from that context worker's engine, where the prefill is called `handover_key`.
    """

    request_id: str  # unique per sequence, for example "cmpl-1a2b/0"
    prompt_token_ids: list[int]
    params: SamplingParams
    request_type: RequestType = "context_and_generation"
    output_token_ids: list[int] = []
    ticket: bytes | None = None
    timeout_s: float | None = None
    cache_salt: str = ""
    handover_key: str = ""  # context_only: a generation worker may follow the prefill by this name
    owner: str = ""  # generation_only: the KV endpoint of the context worker to follow


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Return the blocks that a ticket holds; unknown tickets are ignored."""

    ticket_id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


class WatchBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="watch_blocks"):
    """From now on, say with each step what entered and left the prefix cache; first, say all that is in it."""

    enabled: bool
    with_tokens: bool = False


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Is the step loop there? A Pong says so."""


ToEngine = Submit | Abort | Release | Shutdown | WatchBlocks | Ping


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities of one drawn token, before temperature and truncation."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []  # most likely first


# Of a generation leg's response, in its head: "1" when the KV of all its tickets has come or was here already, "0" when
# it computes prompts instead, or cannot tell the tickets' owner; left out when that is not known yet.
FETCHED_HEADER = "X-Diptych-Fetched"


class SequenceTimes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Durations of the stages before a sequence's first token here; they sum to the engine's part of TTFT."""

    follow_s: float = 0.0  # submit to the end of its prefill elsewhere, 0 when that was over
    queue_s: float = 0.0  # from then to first scheduled (or fetch started)
    fetch_s: float = 0.0  # whole KV fetch, 0 when none
    prefill_s: float = 0.0  # first scheduled (or fetched) to first token
    wire_s: float = 0.0  # part of fetch_s that was copying
    wire_bytes: int = 0
    fetched: bool = False  # the KV of its ticket is here, and the ticket's owner hears of it
    transport: str = ""
    ready_at: float = 0.0  # monotonic, of this host: when its first step could begin, and when the
    drawn_at: float = 0.0  # token was there


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Engine to HTTP process: what one step brought for one sequence. Exactly one event has `finish_reason`."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob] | None = None  # with the first token: of the prompt's tokens but the first
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # set when a stop token (not the model's own EOS) ended it
    error: str | None = None  # with finish_reason "error"
    error_status: int = 500
    ticket: bytes | None = None  # context_only: with the first token
    ticket_id: str | None = None
    num_cached_tokens: int | None = None  # with the first event
    handed_over: bool = False  # the context leg drew these tokens, and prints them
    times: SequenceTimes | None = None  # with the first token


class LinkStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """KV copies from one peer over one transport. Totals since the start, but for `open` and `probed_gb_s`."""

    peer: str  # host:port of its transceiver
    transport: str
    copies: int = 0  # that ended well, as do the figures below
    bytes: int = 0
    wait_s: float = 0.0  # from the fetch's begin to the copy's
    copy_s: float = 0.0  # digests that are computed as the bytes land included
    verify_s: float = 0.0  # from the last byte's arrival to the proof that it is the right one
    open: int = 0  # copies that run now
    failures: dict[str, int] = {}  # by code
    probed_gb_s: float = 0.0  # what the start-up measurement found; 0: none


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot for /metrics, sent at most every 100 ms and when the engine goes idle."""

    free_blocks: int = 0
    cached_blocks: int = 0
    active_blocks: int = 0
    leased_blocks: int = 0
    total_blocks: int = 0
    tokens_per_block: int = 0
    waiting: int = 0
    running: int = 0
    prefilling: int = 0  # those of them whose prompt is not computed yet
    pending_prompt_tokens: int = 0  # what is left of those prompts
    fetching: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    fetches: int = 0
    fetch_failures: dict[str, int] = {}
    fetch_bytes: int = 0
    fetch_s: float = 0.0
    leases_expired: int = 0
    queued_fetches: int = 0  # for one of `max_concurrent_fetches`, or for max_tokens_in_buffer
    links: list[LinkStats] = []
    handovers: int = 0  # prefills followed to their end
    blocks_ahead: int = 0  # KV blocks fetched while their prefill went on
    iteration: dict[str, Any] | None = None  # the last step, when enable_iter_perf_stats is on


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """First message of an engine: it can take requests now."""

    pid: int
    incarnation: str
    max_seq_len: int
    vocab_size: int
    layout: dict[str, Any]
    num_blocks: int
    pool_bytes: int = 0
    device: str = "cpu"
    max_batch_size: int = 0
    kv_peer: bytes = b""  # how the transceiver is reached, for GET /kv/peer
    kv_endpoint: str = ""  # where peers follow its prefills
    kernel: str  # which kernels run the model, for the log and /server_info
    load_s: float = 0.0


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Instead of EngineReady: why the engine cannot start, in one sentence."""

    message: str


class EngineProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Before EngineReady: what it is busy with."""

    message: str
    fraction: float | None = None


class StoredBlock(msgspec.Struct, frozen=True, array_like=True):
    """What a block of the prefix cache holds."""

    key: int  # diptych.block_hash.block_key
    parent: int | None  # None: the first block of a prompt without a salt
    token_ids: list[int]


class BlockChanges(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What entered and left a prefix cache, as packed keys (diptych.block_hash.pack_keys)."""

    stored: bytes = b""
    removed: bytes = b""
    described: list[StoredBlock] = []  # stored ones, when asked for with their tokens
    reset: bool = False  # `stored` is all there is


class KvEvents(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """GET /kv_events, as msgpack: a worker's prefix cache changed from the position asked for to `last`."""

    epoch: str  # the worker's incarnation
    last: int  # position to ask for next
    changes: BlockChanges | None = None  # None: nothing happened within the wait
    age_s: float = 0.0  # of the oldest change


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True, tag="output", omit_defaults=True):
    """Everything one step brought, in one message."""

    events: list[TokenEvent] = []
    stats: EngineStats | None = None
    blocks: BlockChanges | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    pass


FromEngine = EngineReady | EngineFailed | EngineProgress | EngineOutput | Pong


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One worker as a registry announces it. What the announcer does not know stays empty: the router asks."""

    worker_id: str
    url: str  # http://host:port
    role: Role
    model: str = ""
    incarnation: str = ""  # changes with every start of the process
    state: WorkerState = "READY"
    layout: str = ""  # fingerprint of its KV layout
    load: dict[str, float] = {}
