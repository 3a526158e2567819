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


class OwnerRank(msgspec.Struct, frozen=True, kw_only=True):
    """Where one rank of the owner keeps its part of every block of the ticket.

    Block ids and generation numbers are the same on all ranks: one scheduler hands them out.
    """

    ticket_id: str  # of the rank's own lease
    incarnation: str  # of the process that owns the blocks
    layout: KvLayout
    fingerprint: str
    digests: list[int] = []  # of each block's bytes; empty: the owner computes none
    digest_kind: str = "xxh3_64"
    host: str  # of the rank's transceiver: control messages, and data over tcp
    port: int
    transports: dict[str, bytes]  # transport name -> region descriptor


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    version: int = VERSION
    ticket_id: str  # 128 random bits, in hex; empty: no lease holds the blocks, they may go at any time
    incarnation: str  # of the engine process that owns the blocks
    layout: KvLayout
    fingerprint: str
    num_tokens: int
    block_ids: list[int]
    generations: list[int]  # one a block, as they were when the ticket was made
    digests: list[int] = []  # of each block's bytes; empty: the owner computes none
    host: str  # of the owner's transceiver: control messages, and data over tcp
    port: int
    transports: dict[str, bytes]  # transport name -> region descriptor
    lease_s: float
    digest_kind: str = "xxh3_64"
    ranks: list[OwnerRank] = []  # of an owner with several; empty: the fields above are its only one

    @property
    def owners(self) -> list[OwnerRank]:
        return self.ranks or [self.first_rank()]

    def first_rank(self) -> OwnerRank:
        return OwnerRank(
            ticket_id=self.ticket_id,
            incarnation=self.incarnation,
            layout=self.layout,
            fingerprint=self.fingerprint,
            digests=self.digests,
            digest_kind=self.digest_kind,
            host=self.host,
            port=self.port,
            transports=self.transports,
        )


class _Head(msgspec.Struct):
    version: int


_ENCODER = msgspec.msgpack.Encoder()
_TICKET = msgspec.msgpack.Decoder(Ticket)
_HEAD = msgspec.msgpack.Decoder(_Head)
_RANK = msgspec.msgpack.Decoder(OwnerRank)


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


def encode_rank(rank: OwnerRank) -> bytes:
    return _ENCODER.encode(rank)


def decode_rank(data: bytes) -> OwnerRank:
    try:
        return _RANK.decode(data)
    except msgspec.MsgspecError as error:
        raise TransferError(f"the peer's description cannot be read: {error}", code="layout") from error


def join(tickets: list[Ticket]) -> Ticket:
    """One ticket for the same blocks of several ranks, made of each rank's own."""
    first = tickets[0]
    assert all(ticket.block_ids == first.block_ids for ticket in tickets)
    assert all(ticket.generations == first.generations for ticket in tickets)
    return msgspec.structs.replace(first, ranks=[ticket.first_rank() for ticket in tickets])


def without_leases(ticket: Ticket) -> Ticket:
    """For a reader that is not the one to tell the owner."""
    ranks = [msgspec.structs.replace(rank, ticket_id="") for rank in ticket.ranks]
    return msgspec.structs.replace(ticket, ticket_id="", ranks=ranks)


def _check(ticket: Ticket) -> None:
    num_blocks = len(ticket.block_ids)
    for rank in ticket.owners:
        if len(ticket.generations) != num_blocks or len(rank.digests) not in (0, num_blocks):
            raise TransferError(
                f"ticket names {num_blocks} blocks, {len(ticket.generations)} generation numbers "
                f"and {len(rank.digests)} digests",
                code="layout",
            )
        if rank.layout.fingerprint() != rank.fingerprint:
            raise TransferError(
                f"ticket's fingerprint {rank.fingerprint} is not that of its layout", code="layout"
            )
