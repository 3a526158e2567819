"""What a step does with rows that are alone in their sequence: attend over the cache, and draw the next token.

Used by graphs and by steps launched kernel by kernel. Knows neither chunks nor layers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from diptych.kernels.batch_state_triton import advance_rows
from diptych.kernels.decode_attention_triton import DecodePlan, decode_attention
from diptych.kernels.gpu import num_multiprocessors
from diptych.kernels.rope_triton import HeadInputs
from diptych.kernels.sampling_triton import DrawParameters, draw_greedy, draw_sampled
from diptych.worker.collectives import ALONE, Collectives
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
        expected: int | None = None,
    ) -> None:
        """As `decode_attention`, for rows `positions` and `slots` [T] of the state.

        `expected`: how many of the rows are no padding, about; None: all.
        """
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
            plan=DecodePlan.choose(
                expected or len(positions),
                inputs.layout,
                cache.itemsize,
                self._num_sms,
                config.max_position_embeddings,
            ),
            arrivals=self._arrivals,
            out=out,
        )


class Draw:
    def __init__(self, state: DeviceState, ends: Iterable[int], ranks: Collectives = ALONE) -> None:
        """`ends`: ids that a sequence may not draw before its least number of tokens."""
        self._state = state
        self._ranks = ranks
        names = set(DrawParameters.__dataclass_fields__) - {"ends"}
        self._parameters = DrawParameters(
            ends=torch.tensor(sorted(ends), dtype=torch.int32, device=state.device),
            **{name: state.field(name) for name in names},
        )

    def run(self, logits: Tensor, slots: Tensor, positions: Tensor, *, sampled: bool) -> Tensor:
        """The rows' tokens [T] int32, -1 where logits are no numbers. `sampled`: some row has a temperature."""
        drawn, highest = draw_greedy(logits, slots, positions, self._parameters)
        if sampled:
            draw_sampled(logits, highest, drawn, slots, positions, self._parameters)
        return drawn

    def advance(self, logits: Tensor, slots: Tensor, positions: Tensor, *, sampled: bool) -> Tensor:
        """As `run`, on every rank what the first one drew; the slots' state moves on by it."""
        drawn = self.run(logits, slots, positions, sampled=sampled)
        self._ranks.from_first(drawn)
        state = self._state
        advance_rows(slots, positions, drawn, state.field("tokens"), state.field("positions"))
        return drawn
