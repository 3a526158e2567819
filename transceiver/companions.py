"""The other ranks of an engine that runs on several, as the transceiver of its first rank sees them.

One scheduler hands out blocks, so a block has the same number and the same owner on every rank: the first rank alone
keeps leases and speaks with peers. The others say where their part of a block is, and fetch their part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from diptych.transceiver.ticket import OwnerRank, Ticket


class CompanionFetch(Protocol):
    """A fetch that all companions are busy with, each for itself."""

    def abort(self) -> None: ...

    def join(self) -> int:
        """Wait until every companion has let go of its destination: bytes copied. TransferError when one failed.

        Every companion's copy has its own deadline.
        """
        ...


class Companions(Protocol):
    def owners(self, block_ids: Sequence[int], num_tokens: int) -> list[OwnerRank]:
        """Each companion's part of these blocks, which are complete, without a lease."""
        ...

    def fetch(
        self, ticket: Ticket, source_indices: Sequence[int], destination_blocks: Sequence[int]
    ) -> CompanionFetch: ...

    def forget(self, incarnation: str) -> None:
        """An owner is gone: let go of its memory."""
        ...


@dataclass(frozen=True, slots=True)
class _NothingToFetch:
    def abort(self) -> None:
        pass

    def join(self) -> int:
        return 0


NOTHING_TO_FETCH: CompanionFetch = _NothingToFetch()


@dataclass(frozen=True, slots=True)
class _NoCompanions:
    def owners(self, block_ids: Sequence[int], num_tokens: int) -> list[OwnerRank]:
        return []

    def fetch(
        self, ticket: Ticket, source_indices: Sequence[int], destination_blocks: Sequence[int]
    ) -> CompanionFetch:
        return NOTHING_TO_FETCH

    def forget(self, incarnation: str) -> None:
        pass


NO_COMPANIONS: Companions = _NoCompanions()
