"""What the transceiver of rank 0 asks of the other ranks' transceivers."""

import itertools
import queue
from collections.abc import Sequence
from dataclasses import dataclass

from diptych.errors import TransferError
from diptych.transceiver import ticket as tickets
from diptych.transceiver.ticket import OwnerRank, Ticket
from diptych.worker.rank_group import Rank, RankGroup
from diptych.worker.rank_messages import AbortFetch, Describe, Described, Fetch, Fetched, Forget

# Beyond the deadline that a rank's transceiver keeps itself.
_GRACE_S = 10.0

_Reply = queue.SimpleQueue[Described | Fetched]


@dataclass(frozen=True, slots=True)
class _RankFetch:
    group: RankGroup
    call: int
    replies: list[tuple[Rank, _Reply]]
    timeout_s: float

    def abort(self) -> None:
        for rank, _ in self.replies:
            self.group.send(rank, AbortFetch(self.call))

    def join(self) -> int:
        num_bytes, failure = 0, None
        for rank, reply in self.replies:
            fetched = _wait(reply, rank, self.timeout_s)
            assert isinstance(fetched, Fetched)
            num_bytes += fetched.num_bytes
            if fetched.code and failure is None:
                failure = TransferError(f"rank {rank.number}: {fetched.message}", code=fetched.code)
        if failure is not None:
            raise failure
        return num_bytes


class RankCompanions:
    """The protocol of transceiver/companions.py. `timeout_s`: of one fetch."""

    def __init__(self, group: RankGroup, timeout_s: float) -> None:
        self._group = group
        self._timeout_s = timeout_s + _GRACE_S
        self._calls = itertools.count(1)

    def owners(self, block_ids: Sequence[int], num_tokens: int) -> list[OwnerRank]:
        call, group = next(self._calls), self._group
        replies = [(rank, group.expect(rank, call)) for rank in group.ranks]
        for rank in group.ranks:
            group.send(rank, Describe(call, group.num_steps_done, list(block_ids), num_tokens))
        owners = []
        for rank, reply in replies:
            described = _wait(reply, rank, self._timeout_s)
            assert isinstance(described, Described)
            owners.append(tickets.decode_rank(described.owner))
        return owners

    def fetch(
        self, ticket: Ticket, source_indices: Sequence[int], destination_blocks: Sequence[int]
    ) -> _RankFetch:
        call, group = next(self._calls), self._group
        data = tickets.encode(tickets.without_leases(ticket))
        fetch = _RankFetch(
            group, call, [(rank, group.expect(rank, call)) for rank in group.ranks], self._timeout_s
        )
        for rank in group.ranks:
            group.send(rank, Fetch(call, data, list(source_indices), list(destination_blocks)))
        return fetch

    def forget(self, incarnation: str) -> None:
        for rank in self._group.ranks:
            self._group.send(rank, Forget(incarnation))


def _wait(reply: _Reply, rank: Rank, timeout_s: float) -> Described | Fetched:
    try:
        return reply.get(timeout=timeout_s)
    except queue.Empty:
        raise TransferError(f"rank {rank.number} of the engine does not answer", code="internal") from None
