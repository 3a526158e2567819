"""The ticket: everything a reader must know to fetch the KV of one finished prefill.

Bytes to everyone but the transceiver: msgpack with a version, never pickle. Says where the blocks are and how
to prove that they are still the same; knows nothing of the request that they belong to.
"""

import secrets

import msgspec

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout

VERSION = 1
MAX_BYTES = 16 << 20


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    version: int = VERSION
    ticket_id: str  # 128 random bits, in hex
    incarnation: str  # of the engine process that owns the blocks
    layout: KvLayout
    fingerprint: str
    num_tokens: int
    block_ids: list[int]
    generations: list[int]  # one a block, as they were when the ticket was made
    digests: list[int] = []  # xxh3_64 of each block's bytes; empty: the owner computes none
    host: str  # of the owner's transceiver: control messages, and data over tcp
    port: int
    transports: dict[str, bytes]  # transport name -> region descriptor
    lease_s: float


class _Head(msgspec.Struct):
    version: int


_ENCODER = msgspec.msgpack.Encoder()
_TICKET = msgspec.msgpack.Decoder(Ticket)
_HEAD = msgspec.msgpack.Decoder(_Head)


def new_ticket_id() -> str:
    return secrets.token_hex(16)


def encode(ticket: Ticket) -> bytes:
    return _ENCODER.encode(ticket)


def decode(data: bytes) -> Ticket:
    if len(data) > MAX_BYTES:
        raise TransferError(f"ticket is {len(data)} bytes long, allowed are {MAX_BYTES}", code="layout")
    try:
        version = _HEAD.decode(data).version
        if version != VERSION:
            raise TransferError(f"ticket has version {version}, this worker reads {VERSION}", code="layout")
        ticket = _TICKET.decode(data)
    except msgspec.MsgspecError as error:
        raise TransferError(f"ticket cannot be read: {error}", code="layout") from error
    _check(ticket)
    return ticket


def _check(ticket: Ticket) -> None:
    num_blocks = len(ticket.block_ids)
    if len(ticket.generations) != num_blocks or len(ticket.digests) not in (0, num_blocks):
        raise TransferError(
            f"ticket names {num_blocks} blocks, {len(ticket.generations)} generation numbers "
            f"and {len(ticket.digests)} digests",
            code="layout",
        )
    if ticket.layout.fingerprint() != ticket.fingerprint:
        raise TransferError(
            f"ticket's fingerprint {ticket.fingerprint} is not that of its layout", code="layout"
        )
