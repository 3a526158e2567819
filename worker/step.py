"""What one step runs on: the rows as plain arrays, and the same rows ready for a torch model.

Knows nothing of scheduling or sampling. Rows of one sequence are consecutive with ascending positions, so a
sequence's context length after the step is its last position + 1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diptych.kernels.attention import AttentionPlan, plan_attention

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T rows (tokens) of S sequences; logits are wanted for R of the rows."""

    token_ids: IntArray  # [T]
    positions: IntArray  # [T]
    sequence_ids: IntArray  # [T]: which row of block_tables
    block_tables: IntArray  # [S, max_blocks]; entries past a sequence's context are never read
    logits_rows: IntArray  # [R]: indices into the T rows

    def query_starts(self) -> IntArray:
        """First row of each run of one sequence, and T at the end: [number of runs + 1]."""
        changes = np.flatnonzero(np.diff(self.sequence_ids)) + 1
        starts = np.concatenate(([0], changes, [len(self.sequence_ids)]))
        return starts.astype(np.int32)


@dataclass(frozen=True, slots=True)
class StepContext:
    """A step on the model's device. Sequences without rows in the step are left out of S."""

    positions: Tensor  # [T]
    sequence_ids: Tensor  # [T], 0 to S - 1 ascending
    query_starts: Tensor  # [S + 1]
    context_lengths: Tensor  # [S], after this step
    block_tables: Tensor  # [S, max_blocks]
    logits_rows: Tensor  # [R]
    pool: Tensor  # [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]
    attention: AttentionPlan

    @classmethod
    def from_batch(cls, batch: StepBatch, pool: Tensor, sliding_window: int | None) -> "StepContext":
        starts = batch.query_starts()
        counts = np.diff(starts)
        context_lengths = batch.positions[starts[1:] - 1] + 1
        block_tables = batch.block_tables[batch.sequence_ids[starts[:-1]]]
        device = pool.device

        def move(array: npt.NDArray[np.integer]) -> Tensor:
            # Indexing wants int64; the host copy is a few kilobytes.
            return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)

        return cls(
            positions=move(batch.positions),
            sequence_ids=move(np.repeat(np.arange(len(counts)), counts)),
            query_starts=move(starts),
            context_lengths=move(context_lengths),
            block_tables=move(block_tables),
            logits_rows=move(batch.logits_rows),
            pool=pool,
            attention=plan_attention(
                positions=batch.positions,
                query_starts=starts,
                block_tables=block_tables,
                tokens_per_block=pool.shape[4],
                sliding_window=sliding_window,
                device=device,
            ),
        )

    def layer_cache(self, layer: int) -> Tensor:
        """A strided view of one layer, `[num_blocks, 2, num_kv_heads, tokens_per_block, head_dim]`."""
        return self.pool[:, layer]
