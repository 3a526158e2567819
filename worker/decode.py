"""Attention of the rows of a step that are alone in their sequence: the products of one layer in, attended values out.

Used by graphs and by steps launched kernel by kernel. Knows neither chunks nor layers.
"""

import torch
from torch import Tensor

from diptych.kernels.decode_attention_triton import DecodePlan, decode_attention
from diptych.kernels.gpu import num_multiprocessors
from diptych.kernels.rope_triton import HeadInputs
from diptych.worker.device_state import DeviceState
from diptych.worker.models.config import ModelConfig


class Decode:
    def __init__(self, config: ModelConfig, state: DeviceState) -> None:
        self._config = config
        self._state = state
        self._num_sms = num_multiprocessors(state.device)
        count = state.num_slots * config.num_kv_heads
        self._arrivals = torch.zeros(count, dtype=torch.int32, device=state.device)

    def run(
        self,
        parts: Tensor,
        inputs: HeadInputs,
        cache: Tensor,
        *,
        positions: Tensor,
        slots: Tensor,
        out: Tensor,
    ) -> None:
        """As `decode_attention`, for rows `positions` and `slots` [T] of the state."""
        config = self._config
        decode_attention(
            parts,
            inputs,
            cache,
            positions=positions,
            slots=slots,
            tables=self._state.tables,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
            plan=DecodePlan.choose(len(positions), inputs.layout.num_kv_heads, self._num_sms),
            arrivals=self._arrivals,
            out=out,
        )
