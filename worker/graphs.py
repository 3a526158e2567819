"""CUDA graphs of steps in which every sequence has one row and draws, one for each padded batch size.

A graph reads rows, tokens, positions and block tables from the device state and leaves the drawn tokens there, so that
the next step can be launched before anyone has read them.
"""

from torch import Tensor

from diptych.kernels.batch_state_triton import gather_rows
from diptych.kernels.rope_triton import HeadInputs
from diptych.worker.captured import CapturedSteps, StepOutput
from diptych.worker.models.cuda_network import Rows


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: close together where a step is short, 7 to 12 % apart above."""
    sizes = [1, 2, 4]
    for start, stop, step in ((8, 128, 8), (128, 256, 16), (256, 512, 32), (512, max_rows, 64)):
        sizes += range(start, stop, step)
    return [*(size for size in sizes if size < max_rows), max_rows]


class DecodeGraphs(CapturedSteps):
    def padded(self, num_rows: int) -> int | None:
        """The size that serves `num_rows`; None: too many."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def _step(self, size: int, *, sampled: bool) -> StepOutput:
        state = self._state
        slots = state.rows[:size]
        tokens, positions = gather_rows(slots, state.field("tokens"), state.field("positions"))

        def attend(parts: Tensor, inputs: HeadInputs, cache: Tensor) -> Tensor:
            layout = inputs.layout
            out = cache.new_empty(size, layout.num_heads, layout.head_dim, dtype=self._network.dtype)
            self._decode.run(parts, inputs, cache, positions=positions, slots=slots, out=out)
            return out

        logits = self._network.forward(Rows(tokens, attend), self._pool)
        drawn = self._draw.advance(logits, slots, positions, sampled=sampled)
        return StepOutput(logits, drawn)
