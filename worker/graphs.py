"""CUDA graphs of whole decode steps, one for each padded batch size: no launches, no Python between kernels.

A graph reads rows, tokens, positions and block tables from the device state and leaves the drawn tokens there, so that
the next step can be launched before anyone has read them.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diptych.kernels.batch_state_triton import advance_rows, gather_rows
from diptych.kernels.rope_triton import HeadInputs
from diptych.worker.decode import Decode, Draw
from diptych.worker.device_state import DeviceState
from diptych.worker.models.cuda_network import CudaNetwork, Rows

log = logging.getLogger(__name__)

_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Where a replay leaves its results; valid until the next replay of any graph."""

    logits: Tensor  # [P, vocab] float32
    drawn: Tensor  # [P] int32: the row's token, or -1 where the logits are no numbers


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: close together where a step is short, 7 to 12 % apart above."""
    sizes = [1, 2, 4]
    for start, stop, step in ((8, 128, 8), (128, 256, 16), (256, 512, 32), (512, max_rows, 64)):
        sizes += range(start, stop, step)
    return [*(size for size in sizes if size < max_rows), max_rows]


class _Floats:
    """Memory of float32 numbers as CUDA libraries describe it to each other."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _alias(tensor: Tensor) -> Tensor:
    """The same float32 memory, without keeping it from being given away: one graph's logits can be a gigabyte."""
    return torch.as_tensor(_Floats(tensor), device=tensor.device)


class DecodeGraphs:
    def __init__(self, network: CudaNetwork, state: DeviceState, pool: Tensor, sizes: list[int]) -> None:
        self._network = network
        self._state = state
        self._pool = pool
        self._decode = Decode(network.config, state)
        self.sizes = sorted(sizes)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._outputs: dict[tuple[int, bool], StepOutput] = {}
        self._draw = Draw(state, network.config.eos_token_ids)

    def capture(self, progress: Callable[[float], None]) -> None:
        """The largest first: the smaller ones then share its memory. `progress` gets fractions."""
        memory = None
        for done, size in enumerate(reversed(self.sizes)):
            for sampled in (True, False):
                for _ in range(_WARM_UPS):  # compiles what is not compiled yet
                    self._step(size, sampled=sampled)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                # Other threads (of NCCL, of the transceiver) may use the device meanwhile.
                with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                    output = self._step(size, sampled=sampled)
                memory = memory or graph.pool()
                self._graphs[size, sampled] = graph
                self._outputs[size, sampled] = StepOutput(_alias(output.logits), output.drawn)
                del output  # from here on the memory of its logits is the next graph's, too
            progress((done + 1) / len(self.sizes))

    def padded(self, num_rows: int) -> int | None:
        """The size that serves `num_rows`; None: too many."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def replay(self, size: int, *, sampled: bool) -> StepOutput:
        """`sampled`: some row has a temperature."""
        self._graphs[size, sampled].replay()
        return self._outputs[size, sampled]

    def _step(self, size: int, *, sampled: bool) -> StepOutput:
        state = self._state
        slots = state.rows[:size]
        tokens, positions = gather_rows(slots, state.field("tokens"), state.field("positions"))

        def attend(parts: Tensor, inputs: HeadInputs, cache: Tensor) -> Tensor:
            layout = inputs.layout
            out = cache.new_empty(size, layout.num_heads, layout.head_dim, dtype=self._network.dtype)
            self._decode.run(parts, inputs, cache, positions=positions, slots=slots, out=out)
            return out

        logits = self._network.forward(Rows(tokens, positions, attend), self._pool)
        drawn = self._draw.run(logits, slots, positions, sampled=sampled)
        self._network.ranks.from_first(drawn)
        advance_rows(slots, positions, drawn, state.field("tokens"), state.field("positions"))
        return StepOutput(logits, drawn)
