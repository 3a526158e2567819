"""Steps as CUDA graphs, for each padded size with and without sampling: no launches, no Python between kernels.

Knows nothing of the rows of a step. Graphs that never run at the same time share memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diptych.worker.decode import Decode, Draw
from diptych.worker.device_state import DeviceState
from diptych.worker.models.cuda_network import CudaNetwork

_WARM_UPS = 2

GraphMemory = Any  # torch's handle of memory that graphs share


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Where a replay leaves its results; valid until the next replay of any graph."""

    logits: Tensor  # [P, vocab] float32
    drawn: Tensor  # [P] int32: the row's token, or -1 where the logits are no numbers


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


class CapturedSteps(ABC):
    def __init__(self, network: CudaNetwork, state: DeviceState, pool: Tensor, sizes: list[int]) -> None:
        self.sizes = sorted(sizes)
        self._network = network
        self._state = state
        self._pool = pool
        self._decode = Decode(network.config, state)
        self._draw = Draw(state, network.config.eos_token_ids, network.ranks)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._outputs: dict[tuple[int, bool], StepOutput] = {}

    def capture(self, progress: Callable[[float], None], memory: GraphMemory = None) -> GraphMemory:
        """The largest first: the smaller ones then share its memory. `progress` gets fractions.

        `memory`: of other graphs; what comes back is for the next ones.
        """
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
        return memory

    def replay(self, size: int, *, sampled: bool) -> StepOutput:
        """`sampled`: some row has a temperature."""
        self._graphs[size, sampled].replay()
        return self._outputs[size, sampled]

    @abstractmethod
    def _step(self, size: int, *, sampled: bool) -> StepOutput: ...
