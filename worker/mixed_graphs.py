"""CUDA graphs of steps with prompts in them, one for each padded number of rows.

What the host knows of a step (rows, who draws, which rows are a run of one prompt) is copied into numbers that lie
still; everything else is as in `CudaRunner`'s steps without a graph. Prompts are attended by the Triton kernel, whose
grid does not depend on them. Rows are single ones first, then prompts, then padding, which is computed (maybe from
numbers that are none) but neither writes anything nor is looked at by another row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diptych.kernels.batch_state_triton import fill_tokens
from diptych.kernels.prefill_attention_triton import PrefillPlan, num_runs, prefill_attention, runs_of
from diptych.kernels.rope_triton import HeadInputs, rope_append
from diptych.worker.captured import CapturedSteps, StepOutput
from diptych.worker.device_state import DeviceState, Int32s, Staging, pieces, room
from diptych.worker.models.cuda_network import CudaNetwork, Rows
from diptych.worker.plan import Chunk
from diptych.worker.prefill import query_starts
from diptych.worker.step_arrays import StepArrays, num_single

MAX_ROWS = 512  # above, the device takes longer than the host that launches for it
MAX_DRAWING = 256  # rows of logits: the largest thing in a graph
# A program walks over a context alone, or over one of few shares of it: longer ones are faster without a graph.
_MAX_PROMPT_CONTEXT = 2048
_MAX_SINGLE_CONTEXT = 8192


def mixed_sizes(max_rows: int) -> list[int]:
    """Numbers of rows to capture, up to `max_rows` and MAX_ROWS: where weights take the time, padding costs little.

    64 is one of them: beyond it, products of FP8 weights round their inputs, which padding must not bring about.
    """
    largest = min(max_rows, MAX_ROWS)
    sizes = [16, 32, 64, 96, 128, *range(192, MAX_ROWS, 64)]
    return [*(size for size in sizes if size < largest), largest]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the graphs of one size read: R rows, of which the first D may be single and any D may draw, N runs."""

    numbers: Tensor  # int32; the others are pieces of it
    token_ids: Tensor  # [R]; negative: the token is in the device state
    slots: Tensor  # [R]
    single_positions: Tensor  # [D]; of the other rows -1
    prompt_positions: Tensor  # [R]; of the other rows -1
    logits_rows: Tensor  # [D]
    draw_slots: Tensor  # [D]; -1: the row does not draw
    draw_positions: Tensor  # [D]
    runs: Tensor  # [3 N], see PrefillPlan

    @classmethod
    def allocate(cls, num_rows: int, num_slots: int, device: torch.device) -> "_Inputs":
        """All of it padding."""
        drawing, runs = min(num_rows, num_slots, MAX_DRAWING), max(4, num_rows // 8)
        counts = [num_rows, num_rows, drawing, num_rows, drawing, drawing, drawing, 3 * runs]
        numbers = torch.zeros(room(counts), dtype=torch.int32, device=device)
        found = cls(numbers, *pieces(numbers, counts))
        for none in (found.slots, found.single_positions, found.prompt_positions, found.draw_slots):
            none.fill_(-1)
        return found

    def takes(self, rows: int, drawing: int, single: int, runs: int) -> bool:
        return (
            rows <= len(self.token_ids)
            and max(drawing, single) <= len(self.logits_rows)
            and 3 * runs <= len(self.runs)
        )

    def arrays(self, single: int, step: StepArrays, runs: Int32s) -> list[Int32s]:
        """The contents for a step, in the order of the pieces."""
        prompt_positions = step.positions.copy()
        prompt_positions[:single] = -1
        drawing = step.logits_rows
        return [
            _padded(step.token_ids, self.token_ids, 0),
            _padded(step.slots, self.slots, -1),
            _padded(step.positions[:single], self.single_positions, -1),
            _padded(prompt_positions, self.prompt_positions, -1),
            _padded(drawing, self.logits_rows, 0),
            _padded(step.slots[drawing], self.draw_slots, -1),
            _padded(step.positions[drawing], self.draw_positions, 0),
            _padded(runs.ravel(), self.runs, 0),
        ]


class MixedGraphs(CapturedSteps):
    def __init__(self, network: CudaNetwork, state: DeviceState, pool: Tensor, sizes: list[int]) -> None:
        super().__init__(network, state, pool, sizes)
        self._staging = Staging(state.device)
        self._inputs = {size: _Inputs.allocate(size, state.num_slots, state.device) for size in self.sizes}

    def padded(self, chunks: list[Chunk]) -> int | None:
        """The size that serves the chunks; None: there is none, or they are faster without."""
        single = num_single(chunks)
        rest = chunks[single:]
        if any(chunk.num_telling for chunk in chunks) or not (
            _sees_at_most(_MAX_SINGLE_CONTEXT, chunks[:single]) and _sees_at_most(_MAX_PROMPT_CONTEXT, rest)
        ):
            return None
        rows = sum(chunk.count for chunk in chunks)
        drawing = sum(chunk.draws for chunk in chunks)
        runs = sum(num_runs(chunk.count) for chunk in rest)
        return next(
            (size for size in self.sizes if self._inputs[size].takes(rows, drawing, single, runs)), None
        )

    def load(self, size: int, chunks: list[Chunk], step: StepArrays) -> Tensor:
        """Before a replay: its contents. Gives the slots `[D]` of the rows that draw, valid until the next load."""
        single = num_single(chunks)
        rest = chunks[single:]
        runs = runs_of(single + query_starts(rest), np.array([chunk.start for chunk in rest], np.int32))
        inputs = self._inputs[size]
        self._staging.send_into(inputs.numbers, *inputs.arrays(single, step, runs))
        return inputs.draw_slots

    def _step(self, size: int, *, sampled: bool) -> StepOutput:
        network, state, inputs = self._network, self._state, self._inputs[size]
        fill_tokens(inputs.token_ids, inputs.slots, state.field("tokens"))

        def attend(parts: Tensor, heads: HeadInputs, cache: Tensor) -> Tensor:
            return self._attend(inputs, parts, heads, cache)

        rows = Rows(inputs.token_ids, attend, inputs.logits_rows.long())
        logits = network.forward(rows, self._pool)
        slots, positions = inputs.draw_slots, inputs.draw_positions
        drawn = self._draw.advance(logits, slots, positions, sampled=sampled)
        return StepOutput(logits, drawn)

    def _attend(self, inputs: _Inputs, parts: Tensor, heads: HeadInputs, cache: Tensor) -> Tensor:
        network, tables = self._network, self._state.tables
        layout, config = heads.layout, network.config
        shape = len(inputs.token_ids), layout.num_heads, layout.head_dim
        out = cache.new_empty(shape, dtype=network.dtype)
        most = len(inputs.single_positions)
        first = slice(most)
        # Zeros for rows that are not single, so it comes before what attends for them.
        self._decode.run(
            parts[:, first],
            heads,
            cache,
            positions=inputs.single_positions,
            slots=inputs.slots[first],
            out=out[first],
            expected=most // 2,  # there are prompts beside them
        )
        query = rope_append(
            parts,
            heads,
            positions=inputs.prompt_positions,
            slots=inputs.slots,
            tables=tables,
            cache=cache,
            dtype=network.dtype,
        )
        prefill_attention(
            query,
            cache,
            PrefillPlan(inputs.runs.view(-1, 3)),
            slots=inputs.slots,
            tables=tables,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
            out=out,
        )
        return out


def _sees_at_most(limit: int, chunks: list[Chunk]) -> bool:
    return all(chunk.start + chunk.count <= limit for chunk in chunks)


def _padded(values: Int32s, piece: Tensor, padding: int) -> Int32s:
    found = np.full(len(piece), padding, np.int32)
    found[: len(values)] = values
    return found
