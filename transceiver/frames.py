"""What two transceivers say to each other, and how it is framed: a length, then one msgpack message.

Bounded and typed: a frame that is too long, or no message of this protocol, is a `BadFrame` and costs its
sender the connection, nothing else. Raw block bytes travel between a `Sending` and a `Sent` frame. Knows no
sockets.
"""

import hashlib
import hmac
import secrets
import struct
from typing import Annotated, Literal

import msgspec

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 20
MAX_SPANS = 16_384  # of one Read; keeps it far below MAX_FRAME_BYTES
NONCE_BYTES = 16

LENGTH = struct.Struct("<I")

Kind = Literal["control", "data", "notices", "ucx", "nixl"]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, msgspec.Meta(max_length=32)]
TicketId = Annotated[str, msgspec.Meta(max_length=64)]
Key = Annotated[str, msgspec.Meta(max_length=256)]


class BadFrame(Exception):
    """The other side does not speak this protocol."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Reader to owner, first: whom I think I am talking to, and what I want."""

    version: int
    kind: Kind
    incarnation: Annotated[str, msgspec.Meta(max_length=64)]
    nonce: Nonce


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Owner's answer: it is the one, here is its proof, and whether it wants one too."""

    nonce: Nonce
    proof: Proof
    wants_proof: bool


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    code: Literal["layout", "peer_gone", "refused"]
    message: str


class Prove(msgspec.Struct, frozen=True, tag="prove"):
    proof: Proof


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Control: I read this ticket's blocks from now on; if I vanish, they are yours again."""

    ticket_id: TicketId


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """Control: still reading."""

    ticket_ids: list[TicketId]


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Control: no longer reading. `complete`: copied and verified, so nobody else will ask."""

    ticket_id: TicketId
    complete: bool


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Transports with a library of their own, reader to owner: what the owner's library must know of mine."""

    data: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME_BYTES // 2)]


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """The owner's answer: what mine must know of its."""

    data: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME_BYTES // 2)]


class Reading(msgspec.Struct, frozen=True, tag="reading"):
    """nixl: I read your memory from now on, until my next message."""


class Alone(msgspec.Struct, frozen=True, tag="alone"):
    """nixl: do nothing for anybody's reads from your Attached on, until my next message; I try to do without."""


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Data: send these byte spans (int64: offset, length, ...), then these blocks' (int64) generations."""

    spans: bytes
    blocks: bytes


class Sending(msgspec.Struct, frozen=True, tag="sending"):
    """Data: this many raw bytes follow."""

    num_bytes: int


class Sent(msgspec.Struct, frozen=True, tag="sent"):
    """Data: the generation numbers (uint64) as they were after the last raw byte."""

    generations: bytes


class Follow(msgspec.Struct, frozen=True, tag="follow"):
    """Notices, reader to owner: tell me how the prefill of this name goes on, whether it has begun or not."""

    key: Key


class Unfollow(msgspec.Struct, frozen=True, tag="unfollow"):
    key: Key


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Notices: the prefill's first `num_tokens` tokens are computed; the ticket tells where, without a lease."""

    key: Key
    content: bytes  # what the KV is of; the transceiver does not look into it
    num_tokens: int
    ticket: bytes


class Handed(msgspec.Struct, frozen=True, tag="handed"):
    """Notices, the last: the prefill is over. The ticket is a leased one, or empty when nobody need go on."""

    key: Key
    content: bytes
    ticket: bytes
    note: bytes  # from engine to engine


class Withdrawn(msgspec.Struct, frozen=True, tag="withdrawn"):
    """Notices, the last: there will be no ticket."""

    key: Key
    reason: str


Notice = Progress | Handed | Withdrawn
Message = (
    Hello
    | Welcome
    | Refused
    | Prove
    | Begin
    | Renew
    | Finish
    | Follow
    | Unfollow
    | Progress
    | Handed
    | Withdrawn
    | Attach
    | Attached
    | Reading
    | Alone
    | Read
    | Sending
    | Sent
)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    body = _ENCODER.encode(message)
    assert len(body) <= MAX_FRAME_BYTES, f"frame of {len(body)} bytes"
    return LENGTH.pack(len(body)) + body


def body_length(prefix: bytes) -> int:
    (length,) = LENGTH.unpack(prefix)
    if not 0 < length <= MAX_FRAME_BYTES:
        raise BadFrame(f"frame of {length} bytes, allowed are 1 to {MAX_FRAME_BYTES}")
    return int(length)


def decode(body: bytes) -> Message:
    try:
        message: Message = _DECODER.decode(body)
    except msgspec.MsgspecError as error:
        raise BadFrame(str(error)) from error
    return message


def proof_of(secret: bytes, side: Literal["owner", "reader"], first: bytes, second: bytes) -> bytes:
    """Shows that `side` knows the secret; both nonces are in it, so it is of no use to anybody else."""
    return hmac.digest(secret, b"diptych-kv-1/" + side.encode() + b"/" + first + second, hashlib.sha256)


def same_proof(given: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(given, expected)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)
