"""Generation legs that were dispatched before their prefill was done: follow it, fetch ahead, then schedule them.

While the context worker computes, full blocks that it has finished are fetched into the prefix cache here. A block
is held only while it is being copied; afterwards it may be evicted like any other, so that a prefill which takes long
takes nothing away. Fetching ahead is therefore never needed for correctness: when the prefill is handed over, the
leg becomes an ordinary one with first token and ticket, which finds in the cache what came ahead.

No clock and no threads of its own. Knows nothing of HTTP: a leg whose prefill is lost ends with status 503, and the
router, which hears of the prefill from the context leg as well, dispatches it anew.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import msgspec

from diptych.transceiver.settings import FollowEnded, PrefillHanded, PrefillProgress
from diptych.wire import FinishReason, Submit, TokenEvent
from diptych.worker.live import publish_block
from diptych.worker.scheduler import Scheduler
from diptych.worker.sequence import Sequence

log = logging.getLogger(__name__)

_EVENT = msgspec.msgpack.Decoder(TokenEvent)


class Transceiver(Protocol):
    def follow(self, owner: str, key: str) -> int: ...
    def unfollow(self, follow_id: int) -> None: ...
    def fetch(self, ticket: bytes, source_indices: range, destination_blocks: list[int]) -> int: ...


@dataclass(slots=True, eq=False)
class _Followed:
    sequence: Sequence
    follow_id: int
    heard_at: float
    progress: PrefillProgress | None = None  # the newest that nothing was done about
    prefetch: int | None = None  # the fetch that runs
    prefetches: bool = True  # after a failure the blocks come all at once, at the end
    handed: PrefillHanded | None = None


@dataclass(frozen=True, slots=True)
class _Prefetch:
    followed: _Followed
    num_matched: int  # of `blocks`, those that were in the cache
    blocks: list[int]  # the sequence's first ones, referenced until the copy has let go of them


class Following:
    def __init__(self, scheduler: Scheduler, transceiver: Transceiver, *, patience_s: float) -> None:
        """`patience_s`: how long nothing may be heard of a prefill."""
        self._scheduler = scheduler
        self._transceiver = transceiver
        self._patience_s = patience_s
        self._by_request: dict[str, _Followed] = {}
        self._by_follow: dict[int, _Followed] = {}
        self._prefetching: dict[int, _Prefetch] = {}
        self._events: list[TokenEvent] = []
        self.num_handed_over = 0
        self.num_blocks_ahead = 0

    def __len__(self) -> int:
        """Open prefills and fetches."""
        return len(self._by_request) + len(self._prefetching)

    @property
    def held_blocks(self) -> list[int]:
        return [block for prefetch in self._prefetching.values() for block in prefetch.blocks]

    def add(self, request: Submit, now: float) -> None:
        follow_id = self._transceiver.follow(request.owner, request.handover_key)
        followed = _Followed(Sequence(request, now), follow_id, now)
        self._by_request[request.request_id] = self._by_follow[follow_id] = followed

    def abort(self, request_id: str) -> None:
        """A copy that runs goes on: it is short, and what it brings is of use to others."""
        followed = self._by_request.get(request_id)
        if followed is not None:
            self._end(followed, "cancelled")

    def take(self, event: PrefillProgress | PrefillHanded | FollowEnded, now: float) -> None:
        """What the transceiver has heard."""
        followed = self._by_follow.get(event.follow_id)
        if followed is None:
            return  # it ended meanwhile
        followed.heard_at = now
        if isinstance(event, FollowEnded):
            self._end(followed, "error", event.message, 503)
        elif event.content != followed.sequence.content_hash():
            self._end(followed, "error", "the context worker made other tokens of the prompt", 503)
        elif isinstance(event, PrefillProgress):
            followed.progress = event
        else:
            followed.handed = event

    def fetched(self, fetch_id: int, *, failure: str | None, held: tuple[int, ...] = ()) -> None:
        """A fetch of ours has ended; `failure` says why it brought nothing, and its copy lingers in `held`."""
        prefetch = self._prefetching.pop(fetch_id)
        sequence, size = prefetch.followed.sequence, self._scheduler.limits.tokens_per_block
        prefetch.followed.prefetch = None
        if failure is None:
            for index in range(prefetch.num_matched, len(prefetch.blocks)):
                publish_block(self._scheduler.pool, sequence, index, prefetch.blocks[index], size)
            self.num_blocks_ahead += len(prefetch.blocks) - prefetch.num_matched
        else:
            prefetch.followed.prefetches = False
            log.info("%s: nothing is fetched ahead: %s", sequence.id, failure)
        self._scheduler.pool.lease(held)
        self._scheduler.pool.release(prefetch.blocks)

    def is_ours(self, fetch_id: int) -> bool:
        return fetch_id in self._prefetching

    def step(self, now: float) -> list[TokenEvent]:
        """Hand over, fetch ahead and give up, as it is time to; the events are the requests'."""
        for followed in list(self._by_request.values()):
            deadline = followed.sequence.deadline
            if followed.handed is not None and followed.prefetch is None:
                self._hand_over(followed, followed.handed, now)
            elif deadline is not None and now >= deadline:
                self._end(followed, "timeout", "no answer before the request's deadline", 504)
            elif now >= followed.heard_at + self._patience_s:
                silence = f"nothing was heard of the prefill for {self._patience_s:g} s"
                self._end(followed, "error", silence, 503)
            elif followed.prefetch is None and followed.progress is not None:
                self._fetch_ahead(followed, followed.progress)
        events, self._events = self._events, []
        return events

    def _fetch_ahead(self, followed: _Followed, progress: PrefillProgress) -> None:
        followed.progress = None
        pool, sequence = self._scheduler.pool, followed.sequence
        size = self._scheduler.limits.tokens_per_block
        if not (followed.prefetches and pool.reuses):
            return
        num_blocks = min(progress.num_tokens, sequence.num_prompt) // size
        sequence.extend_hashes(size, num_blocks * size)
        matched = pool.match(sequence.hashes[:num_blocks])
        unheld = sum(not pool.is_active(block) for block in matched)
        num_missing = num_blocks - len(matched)
        if num_missing == 0 or unheld + num_missing > self._scheduler.num_spare_blocks:
            return
        pool.take(matched)
        missing = pool.allocate(num_missing)
        assert missing is not None, "they were spare"
        indices = range(len(matched), num_blocks)
        followed.prefetch = self._transceiver.fetch(progress.ticket, indices, missing)
        self._prefetching[followed.prefetch] = _Prefetch(followed, len(matched), matched + missing)

    def _hand_over(self, followed: _Followed, handed: PrefillHanded, now: float) -> None:
        request = followed.sequence.request
        try:
            drawn = _EVENT.decode(handed.note)
        except msgspec.MsgspecError as error:
            self._end(followed, "error", f"the context worker's note cannot be read: {error}", 503)
            return
        self._forget(followed)
        self.num_handed_over += 1
        self._events.append(msgspec.structs.replace(drawn, request_id=request.request_id, handed_over=True))
        if drawn.finish_reason is None:
            leg = msgspec.structs.replace(
                request, output_token_ids=drawn.token_ids, ticket=handed.ticket, owner=""
            )
            self._scheduler.add(leg, now, arrival=followed.sequence.arrival)

    def _end(
        self, followed: _Followed, reason: FinishReason, error: str | None = None, status: int = 500
    ) -> None:
        self._transceiver.unfollow(followed.follow_id)
        self._forget(followed)
        self._events.append(
            TokenEvent(
                request_id=followed.sequence.id, finish_reason=reason, error=error, error_status=status
            )
        )

    def _forget(self, followed: _Followed) -> None:
        del self._by_request[followed.sequence.id], self._by_follow[followed.follow_id]
