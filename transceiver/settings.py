"""What a transceiver is told, and the events it reports."""

from dataclasses import dataclass

from diptych.transceiver.lease import EndReason


@dataclass(frozen=True, slots=True, kw_only=True)
class TransceiverSettings:
    backends: tuple[str, ...] = ("shm", "tcp")  # tried in this order, unless one is measured to be faster
    optional_backends: tuple[str, ...] = ()  # after those; left out when they do not work here
    bind_host: str = "127.0.0.1"
    port: int = 0  # 0: any free port; the ticket says which
    advertise_host: str | None = None  # what readers dial; None: bind_host, or the default route's address
    lease_s: float = 30.0
    timeout_s: float = 30.0  # of one fetch, from the call to its event
    verify_digest: bool = True
    secret: str | None = None
    max_concurrent_fetches: int = 16
    max_tokens_in_flight: int | None = None  # of all running fetches together; a longer one runs alone
    measure_transports: bool = True  # for each peer, in the background; what is clearly faster comes first
    copy_programs: int = 32  # of a GPU's copy kernel at a time: what it takes away from the model


@dataclass(frozen=True, slots=True)
class FetchDone:
    """The blocks are here, verified."""

    fetch_id: int
    bytes: int
    wire_s: float  # spent copying
    total_s: float  # since `fetch` was called
    transport: str  # "" when there was nothing to copy
    told: bool  # the owner knows, or is about to; False: nothing was copied, and it may be out of reach


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """What is in the destination blocks is worth nothing, and nothing writes to them any more, but for `held`: a copy
    lingers in these until a QuarantineEnded names them.

    code: peer_gone, stale, corrupt, deadline, layout, refused (secrets differ), cancelled (by `abort`),
    internal.
    """

    fetch_id: int
    code: str
    message: str
    held: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class QuarantineEnded:
    """Nothing writes to these blocks any more."""

    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """These blocks are their owner's again. Exactly one for each ticket."""

    ticket_id: str
    block_ids: tuple[int, ...]
    reason: EndReason


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """The owner has computed so many tokens of the prefill; its ticket names their full blocks and no lease."""

    follow_id: int
    content: bytes
    num_tokens: int
    ticket: bytes


@dataclass(frozen=True, slots=True)
class PrefillHanded:
    """The prefill is over; nothing follows. `ticket`: a leased one, None when its owner's engine needs no reader."""

    follow_id: int
    content: bytes
    ticket: bytes | None
    note: bytes


@dataclass(frozen=True, slots=True)
class FollowEnded:
    """No more will be heard of the prefill; nothing follows."""

    follow_id: int
    message: str


FollowEvent = PrefillProgress | PrefillHanded | FollowEnded
TransceiverEvent = FetchDone | FetchFailed | QuarantineEnded | LeaseEnded | FollowEvent
