"""One step on the model: a plan in, one drawn token for each chunk that asks for one out."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from diptych.worker.sampler import Row, Sampler
from diptych.worker.scheduler import Chunk, Drawn, StepPlan
from diptych.worker.step import StepBatch

if TYPE_CHECKING:
    from diptych.worker.models.build import Model


class ModelRunner:
    def __init__(self, model: "Model", sampler: Sampler) -> None:
        self._model = model
        self._sampler = sampler

    def run(self, plan: StepPlan) -> list[Drawn | str]:
        logits = self._model.forward(build_batch(plan.chunks))
        rows = [_row(chunk) for chunk in plan.chunks if chunk.draws]
        if rows:
            return self._sampler.sample(logits, rows)
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()  # nothing else waits for this step
        return []


def build_batch(chunks: list[Chunk]) -> StepBatch:
    """The arrays of a step: the chunks' rows one after the other."""
    counts = [chunk.count for chunk in chunks]
    total = sum(counts)
    token_ids = np.empty(total, np.int32)
    positions = np.empty(total, np.int32)
    block_tables = np.zeros((len(chunks), max(len(chunk.sequence.blocks) for chunk in chunks)), np.int32)
    row = 0
    for index, chunk in enumerate(chunks):
        end = chunk.start + chunk.count
        token_ids[row : row + chunk.count] = chunk.sequence.tokens[chunk.start : end]
        positions[row : row + chunk.count] = np.arange(chunk.start, end)
        block_tables[index, : len(chunk.sequence.blocks)] = chunk.sequence.blocks
        row += chunk.count
    last_rows = np.cumsum(counts, dtype=np.int32) - 1
    return StepBatch(
        token_ids=token_ids,
        positions=positions,
        sequence_ids=np.repeat(np.arange(len(chunks), dtype=np.int32), counts),
        block_tables=block_tables,
        logits_rows=last_rows[[chunk.draws for chunk in chunks]].astype(np.int32),
    )


def _row(chunk: Chunk) -> Row:
    sequence = chunk.sequence
    num_prompt = sequence.num_prompt
    return Row(sequence.request.params, sequence.request.prompt_token_ids, sequence.tokens[num_prompt:])
