"""One step on the model: a plan in, one drawn token for each chunk that asks for one out."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from diptych.worker.plan import Chunk, Drawn, StepPlan
from diptych.worker.sampler import Row, Sampler, token_logprobs
from diptych.worker.step import StepBatch

if TYPE_CHECKING:
    from torch import Tensor

    from diptych.worker.models.build import Model


class ModelRunner:
    def __init__(self, model: "Model", sampler: Sampler | None) -> None:
        """`sampler`: None where another rank draws."""
        self._model = model
        self._sampler = sampler

    def needs_tokens(self, plan: StepPlan) -> bool:
        return True

    def collect(self, launched: list[Drawn | str]) -> list[Drawn | str]:
        return launched

    @torch.inference_mode()  # what a model made in it may only be changed in it
    def launch(self, plan: StepPlan) -> list[Drawn | str]:
        """The whole step: there is nothing to wait for afterwards."""
        logits = self._model.forward(build_batch(plan.chunks))
        if self._sampler is None:
            return []
        rows = [_row(chunk) for chunk in plan.chunks if chunk.draws]
        at = len(rows)
        for chunk in plan.chunks:
            if chunk.num_telling:
                tell_prompt(chunk, logits[at : at + chunk.num_telling])
                at += chunk.num_telling
        if rows:
            return self._sampler.sample(logits[: len(rows)], rows)
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()  # nothing else waits for this step
        return []


def tell_prompt(chunk: Chunk, logits: "Tensor") -> None:
    """The prompt's log probabilities that one chunk brings go to its sequence."""
    sequence, first = chunk.sequence, chunk.start + 1
    told = sequence.tokens[first : first + len(logits)]
    sequence.prompt_logprobs += token_logprobs(logits, told, sequence.request.params.num_logprobs or 0)


def build_batch(chunks: list[Chunk]) -> StepBatch:
    """The arrays of a step: the chunks' rows one after the other.

    Logits are asked for of the drawing rows, in the chunks' order, then of those that tell of the prompt.
    """
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
    ends = np.cumsum(counts, dtype=np.int32)
    drawing = (ends - 1)[[chunk.draws for chunk in chunks]]
    telling = [
        np.arange(end - count, end - count + chunk.num_telling)
        for chunk, count, end in zip(chunks, counts, ends, strict=True)
        if chunk.num_telling
    ]
    return StepBatch(
        token_ids=token_ids,
        positions=positions,
        sequence_ids=np.repeat(np.arange(len(chunks), dtype=np.int32), counts),
        block_tables=block_tables,
        logits_rows=np.concatenate([drawing, *telling]).astype(np.int32),
    )


def _row(chunk: Chunk) -> Row:
    sequence = chunk.sequence
    num_prompt = sequence.num_prompt
    return Row(sequence.request.params, sequence.request.prompt_token_ids, sequence.tokens[num_prompt:])
