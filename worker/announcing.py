"""Prefills that a generation worker may follow: says how each gets on, and what became of it.

The context worker's side of following.py. Called by the step loop, sends nothing itself.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from diptych.wire import Submit, TokenEvent
from diptych.worker.scheduler import Chunk
from diptych.worker.sequence import content_hash

_ENCODER = msgspec.msgpack.Encoder()


class Transceiver(Protocol):
    def is_followed(self, key: str) -> bool: ...
    def show_progress(self, key: str, content: bytes, block_ids: Sequence[int], num_tokens: int) -> None: ...
    def hand_over(self, key: str, content: bytes, ticket: bytes | None, note: bytes) -> None: ...
    def withdraw(self, key: str, reason: str) -> None: ...


class Announcer:
    def __init__(self, transceiver: Transceiver, tokens_per_block: int) -> None:
        self._transceiver = transceiver
        self._tokens_per_block = tokens_per_block
        self._open: dict[str, Submit] = {}

    def add(self, request: Submit) -> None:
        self._open[request.request_id] = request

    def going_on(self, chunks: Iterable[Chunk]) -> None:
        """These chunks are computed next: tell what is there by now, from the prefix cache or from steps before."""
        for chunk in chunks:
            sequence = chunk.sequence
            request = self._open.get(sequence.id)
            num_blocks = sequence.num_computed // self._tokens_per_block
            if request is not None and num_blocks and self._transceiver.is_followed(request.handover_key):
                self._transceiver.show_progress(
                    request.handover_key,
                    sequence.content_hash(),
                    sequence.blocks[:num_blocks],
                    num_blocks * self._tokens_per_block,
                )

    def note(self, event: TokenEvent) -> None:
        """What the engine tells of any sequence."""
        if event.finish_reason is None and event.ticket is None:
            return
        request = self._open.pop(event.request_id, None)
        if request is None:
            return
        if not event.token_ids:
            self._transceiver.withdraw(request.handover_key, event.error or "the prefill was cancelled")
            return
        note = msgspec.structs.replace(event, ticket=None, ticket_id=None, times=None)
        content = content_hash(request.prompt_token_ids, request.cache_salt)
        self._transceiver.hand_over(request.handover_key, content, event.ticket, _ENCODER.encode(note))
