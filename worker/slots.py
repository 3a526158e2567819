"""Which slot of the device state holds which sequence, and what of it the host must change before a step.

Mirrors what is on the device, so that only differences are uploaded: a running sequence costs an upload once per new
block. Pure bookkeeping over numbers.
"""

from dataclasses import dataclass

import numpy as np

from diptych.wire import SamplingParams
from diptych.worker.device_state import DeviceState, Int32s, float_bits, seed_words
from diptych.worker.plan import Chunk
from diptych.worker.sequence import Sequence, Status


@dataclass(slots=True)
class _Entry:
    slot: int
    sequence: Sequence
    blocks: list[int]  # the very list of the sequence: after a preemption it has another
    num_blocks: int = 0  # uploaded
    position: int | None = None  # on the device: of the token that the next decode step computes


def host_draws(params: SamplingParams) -> bool:
    """Whether all tokens of a sequence are drawn by the host, from logits that nothing was done to."""
    return (
        params.num_logprobs is not None
        or params.repetition_penalty != 1.0
        or bool(params.presence_penalty or params.frequency_penalty or params.logit_bias)
    )


class SlotMap:
    def __init__(self, state: DeviceState) -> None:
        self._state = state
        self._entries: dict[str, _Entry] = {}
        self._free = list(range(state.num_slots))[::-1]
        self._rows = np.full(state.num_slots, -1, np.int32)
        self._indices: list[int] = []
        self._values: list[int] = []

    def place(self, chunks: list[Chunk]) -> Int32s:
        """The slot of each chunk's sequence; what is missing on the device is noted for `take_changes`."""
        slots = np.empty(len(chunks), np.int32)
        for index, chunk in enumerate(chunks):
            entry = self._entries.get(chunk.sequence.id)
            if entry is None or entry.sequence is not chunk.sequence:
                entry = self._enter(chunk.sequence, chunks)  # an id may come again
            self._update(entry, chunk)
            slots[index] = entry.slot
        return slots

    def set_rows(self, slots: Int32s, padded: int) -> None:
        """The rows of the next decode step: `slots`, then padding."""
        count = len(slots)
        wanted = np.full(padded, -1, np.int32)
        wanted[:count] = slots
        changed = np.flatnonzero(wanted != self._rows[:padded])
        if len(changed):
            self._indices.extend((changed + self._state.at("rows", 0)).tolist())
            self._values.extend(wanted[changed].tolist())
            self._rows[:padded] = wanted

    def take_changes(self) -> tuple[Int32s, Int32s]:
        """Arena indices and values, to upload before the step."""
        indices, values = np.array(self._indices, np.int32), np.array(self._values, np.int32)
        self._indices, self._values = [], []
        return indices, values

    def _update(self, entry: _Entry, chunk: Chunk) -> None:
        state, blocks = self._state, chunk.sequence.blocks
        if entry.blocks is not blocks:
            entry.blocks, entry.num_blocks = blocks, 0
        if entry.num_blocks < len(blocks):
            first = state.table_at(entry.slot, entry.num_blocks)
            new = blocks[entry.num_blocks :]
            self._indices.extend(range(first, first + len(new)))
            self._values.extend(new)
            entry.num_blocks = len(blocks)
        if chunk.count == 1 and chunk.start != entry.position:
            # Its last token came from elsewhere: with the prompt, from a peer, or after a preemption.
            self._change(entry.slot, "tokens", chunk.sequence.tokens[chunk.start])
            self._change(entry.slot, "positions", chunk.start)
        entry.position = chunk.start + chunk.count if chunk.draws else None

    def _enter(self, sequence: Sequence, chunks: list[Chunk]) -> _Entry:
        if sequence.id in self._entries:
            self._free.append(self._entries.pop(sequence.id).slot)
        if not self._free:
            self._reclaim({chunk.sequence.id for chunk in chunks})
        entry = _Entry(self._free.pop(), sequence, sequence.blocks)
        self._entries[sequence.id] = entry
        params = sequence.request.params
        low, high = seed_words(params.seed)
        fields = {
            "prompt_lengths": sequence.num_prompt,
            "min_tokens": 0 if host_draws(params) else params.min_tokens,
            "temperature": float_bits(params.temperature),
            "top_k": min(params.top_k, 2**31 - 1),
            "top_p": float_bits(params.top_p),
            "min_p": float_bits(params.min_p),
            "seed_low": low,
            "seed_high": high,
        }
        for name, value in fields.items():
            self._change(entry.slot, name, value)
        return entry

    def _change(self, slot: int, name: str, value: int) -> None:
        self._indices.append(self._state.at(name, slot))
        self._values.append(value)

    def _reclaim(self, planned: set[str]) -> None:
        """Take the slots of sequences that no longer run."""
        gone = [
            request_id
            for request_id, entry in self._entries.items()
            if entry.sequence.status is not Status.RUNNING and request_id not in planned
        ]
        self._free += [self._entries.pop(request_id).slot for request_id in gone]
