"""The rows of a plan as arrays on the host, in the order of its chunks. Knows neither devices nor models."""

from dataclasses import dataclass

import numpy as np

from diptych.worker.device_state import Int32s
from diptych.worker.plan import Chunk

_UNREAD = -1  # a token that only the device knows


@dataclass(frozen=True, slots=True)
class StepArrays:
    token_ids: Int32s  # [T]; negative: the token is in the device state
    positions: Int32s  # [T]
    slots: Int32s  # [T]
    logits_rows: Int32s  # [R]: the rows that draw, then those that tell of a prompt

    @classmethod
    def of(cls, chunks: list[Chunk], slots: Int32s) -> "StepArrays":
        """`slots` of the chunks."""
        counts = np.array([chunk.count for chunk in chunks], np.int32)
        ends = np.cumsum(counts, dtype=np.int32)
        token_ids, positions = np.empty((2, int(ends[-1])), np.int32)
        for chunk, end in zip(chunks, ends.tolist(), strict=True):
            row, stop = end - chunk.count, chunk.start + chunk.count
            known = chunk.sequence.tokens[chunk.start : stop]
            token_ids[end - 1] = _UNREAD
            token_ids[row : row + len(known)] = known
            positions[row:end] = np.arange(chunk.start, stop)
        drawing = ends[[chunk.draws for chunk in chunks]] - 1
        telling = [
            np.arange(end - chunk.count, end - chunk.count + chunk.num_telling, dtype=np.int32)
            for chunk, end in zip(chunks, ends.tolist(), strict=True)
            if chunk.num_telling
        ]
        return cls(token_ids, positions, np.repeat(slots, counts), np.concatenate([drawing, *telling]))


def num_single(chunks: list[Chunk]) -> int:
    """Chunks of one row before the first that has more: the scheduler plans decodes first."""
    return next((index for index, chunk in enumerate(chunks) if chunk.count > 1), len(chunks))
