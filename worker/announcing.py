"""Prefills that a generation worker may follow: says how each gets on, and what became of it.

The context worker's side of following.py. Called by the step loop, sends nothing itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from diptych.wire import Submit, TokenEvent
from diptych.worker.plan import Chunk
from diptych.worker.sequence import Status, content_hash

_ENCODER = msgspec.msgpack.Encoder()


class Transceiver(Protocol):
    def is_followed(self, key: str) -> bool: ...
    def show_progress(self, key: str, content: bytes, block_ids: Sequence[int], num_tokens: int) -> None: ...
    def hand_over(self, key: str, content: bytes, ticket: bytes | None, note: bytes) -> None: ...
    def withdraw(self, key: str, reason: str) -> None: ...


@dataclass(slots=True)
class _Prefill:
    request: Submit
    num_told: int = 0  # blocks that its follower knows of


class Announcer:
    def __init__(self, transceiver: Transceiver, tokens_per_block: int) -> None:
        self._transceiver = transceiver
        self._tokens_per_block = tokens_per_block
        self._open: dict[str, _Prefill] = {}

    def add(self, request: Submit) -> None:
        self._open[request.request_id] = _Prefill(request)

    def tell(self, chunks: Iterable[Chunk]) -> None:
        """How far the prefills of these chunks are: called before a step, for what the prefix cache holds, and after
        it. What became of those that drew a token is told by their event."""
        for chunk in chunks:
            sequence = chunk.sequence
            prefill = self._open.get(sequence.id)
            if prefill is None or sequence.status is not Status.RUNNING:
                continue
            key, num_blocks = prefill.request.handover_key, sequence.num_computed // self._tokens_per_block
            if num_blocks > prefill.num_told and self._transceiver.is_followed(key):
                prefill.num_told = num_blocks
                blocks, num_tokens = sequence.blocks[:num_blocks], num_blocks * self._tokens_per_block
                self._transceiver.show_progress(key, sequence.content_hash(), blocks, num_tokens)

    def note(self, event: TokenEvent) -> None:
        """What the engine tells of any sequence."""
        if event.finish_reason is None and event.ticket is None:
            return
        prefill = self._open.pop(event.request_id, None)
        if prefill is None:
            return
        request = prefill.request
        if not event.token_ids:
            self._transceiver.withdraw(request.handover_key, event.error or "the prefill was cancelled")
            return
        note = msgspec.structs.replace(event, ticket=None, ticket_id=None, times=None)
        content = content_hash(request.prompt_token_ids, request.cache_salt)
        self._transceiver.hand_over(request.handover_key, content, event.ticket, _ENCODER.encode(note))
