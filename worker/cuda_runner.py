"""Steps on a GPU: launches a plan and gives back its tokens later, so that the next plan can be launched in between.

A step of single rows that all draw is one replay of a graph (graphs.py). Any other, prompts among decodes
included, is launched kernel by kernel. Tokens stay on the device from step to step; the host learns them by a copy
of a few bytes. Rows that need more than a graph's sampling (penalties, biases, log probabilities) go through
sampler.py, and a plan with such rows must not be launched before the last step's tokens are known: `needs_tokens`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diptych.kernels.batch_state_triton import advance_rows, fill_tokens
from diptych.kernels.rope_triton import HeadInputs, rope_append
from diptych.worker.decode import Decode, Draw
from diptych.worker.device_state import DeviceState, Int32s, Staging
from diptych.worker.graphs import DecodeGraphs
from diptych.worker.models.cuda_network import CudaNetwork, Rows
from diptych.worker.plan import Chunk, Drawn, StepPlan
from diptych.worker.prefill import Prefill
from diptych.worker.runner import tell_prompt
from diptych.worker.sampler import Row, Sampler
from diptych.worker.slots import SlotMap, host_draws

_UNREAD = -1  # a token that only the device knows


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way."""

    tokens: Tensor | None  # for each drawing chunk, on the host, valid after `done`; None: nothing draws
    done: torch.cuda.Event | None
    sampled: dict[int, Drawn | str]  # what the host has drawn, by the number of the drawing chunk


@dataclass(frozen=True, slots=True)
class _Output:
    logits: Tensor  # [R, vocab] float32
    drawn: Tensor  # [R] int32
    slots: Tensor  # [R] int32


class CudaRunner:
    def __init__(
        self,
        network: CudaNetwork,
        pool: Tensor,
        state: DeviceState,
        prefill: Prefill,
        graphs: DecodeGraphs | None,
        sampler: Sampler,
    ) -> None:
        self._network = network
        self._pool = pool
        self._state = state
        self._prefill = prefill
        self._graphs = graphs
        self._sampler = sampler
        self._slots = SlotMap(state)
        self._staging = Staging(state.device)
        self._decode = Decode(network.config, state)
        on_gpu = state.device.type == "cuda"
        self._host = [torch.empty(state.num_slots, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self._draw = Draw(state, network.config.eos_token_ids)

    def needs_tokens(self, plan: StepPlan) -> bool:
        """Whether the host must know all tokens so far before the plan can be launched."""
        return any(chunk.num_telling or (chunk.draws and _by_host(chunk)) for chunk in plan.chunks)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        chunks = plan.chunks
        slots = self._slots.place(chunks)
        graphs = self._graphs
        all_draw = all(chunk.count == 1 and chunk.draws for chunk in chunks)
        size = graphs.padded(len(chunks)) if graphs is not None and all_draw else None
        drawing = [chunk for chunk in chunks if chunk.draws]
        sampled = any(chunk.sequence.request.params.temperature > 0 for chunk in drawing)
        if graphs is not None and size is not None:
            self._slots.set_rows(slots, size)
            self._state.upload(*self._slots.take_changes())
            output = self._replay(graphs, size, len(chunks), sampled=sampled)
        else:
            self._state.upload(*self._slots.take_changes())
            found = self._compute(chunks, slots, sampled=sampled)
            if found is None:
                return Launched(None, self._event(), {})
            output = found
        by_host = self._draw_on_host(drawing, output)
        return self._send(output.drawn, by_host)

    def collect(self, launched: Launched) -> list[Drawn | str]:
        """Waits for the step; for each chunk that draws, its token, or why there is none."""
        if launched.done is not None:
            launched.done.synchronize()
        if launched.tokens is None:
            return []
        found: list[Drawn | str] = [
            Drawn(token) if token >= 0 else "the model computed logits that are not numbers"
            for token in launched.tokens.tolist()
        ]
        for index, drawn in launched.sampled.items():
            found[index] = drawn
        return found

    def _replay(self, graphs: DecodeGraphs, size: int, count: int, *, sampled: bool) -> _Output:
        output = graphs.replay(size, sampled=sampled)
        return _Output(output.logits[:count], output.drawn[:count], self._state.rows[:count])

    def _compute(self, chunks: list[Chunk], chunk_slots: Int32s, *, sampled: bool) -> _Output | None:
        """Kernel by kernel. Rows are in the order of the chunks, single ones first, as the scheduler plans them."""
        token_ids, positions, slots, logits_rows = self._staging.send(*_step_arrays(chunks, chunk_slots))
        step = _StepTensors(token_ids, positions, slots, logits_rows.long())
        fill_tokens(step.token_ids, step.slots, self._state.field("tokens"))
        single = next((index for index, chunk in enumerate(chunks) if chunk.count > 1), len(chunks))
        rest = chunks[single:]
        wants_own = bool(rest) and self._prefill.plan(rest, step.slots[single:], self._state.tables)

        def attend(parts: Tensor, inputs: HeadInputs, cache: Tensor) -> Tensor:
            layout = inputs.layout
            shape = len(step.slots), layout.num_heads, layout.head_dim
            out = cache.new_empty(shape, dtype=self._network.dtype)
            if single:
                first = slice(None, single)
                self._decode.run(
                    parts[:, first],
                    inputs,
                    cache,
                    positions=step.positions[first],
                    slots=step.slots[first],
                    out=out[first],
                )
            if rest:
                own = None
                if wants_own:
                    own = out.new_empty(2, len(out) - single, layout.num_kv_heads, layout.head_dim)
                query = rope_append(
                    parts[:, single:],
                    inputs,
                    positions=step.positions[single:],
                    slots=step.slots[single:],
                    tables=self._state.tables,
                    cache=cache,
                    dtype=self._network.dtype,
                    own=own,
                )
                self._prefill.run(query, cache if own is None else own, out[single:])
            return out

        rows = Rows(step.token_ids, step.positions, attend, step.logits_rows)
        logits = self._network.forward(rows, self._pool)
        num_drawing = sum(chunk.draws for chunk in chunks)
        _tell(chunks, logits[num_drawing:])
        if num_drawing == 0:
            return None
        logits, drawing = logits[:num_drawing], step.logits_rows[:num_drawing]
        slots, positions = slots[drawing], positions[drawing]
        drawn = self._draw.run(logits, slots, positions, sampled=sampled)
        self._network.ranks.from_first(drawn)
        advance_rows(slots, positions, drawn, self._state.field("tokens"), self._state.field("positions"))
        return _Output(logits, drawn, slots)

    def _draw_on_host(self, drawing: list[Chunk], output: _Output) -> dict[int, Drawn | str]:
        """Rows that want more than the kernels do: drawn here, and their tokens put into the state."""
        wanted = [index for index, chunk in enumerate(drawing) if _by_host(chunk)]
        if not wanted:
            return {}
        rows = torch.tensor(wanted, device=output.logits.device)
        found: list[Drawn | str] = []
        if self._network.ranks.rank == 0:
            found = self._sampler.sample(output.logits[rows], [_row(drawing[index]) for index in wanted])
        ids = [drawn.token_id if isinstance(drawn, Drawn) else 0 for drawn in found]
        tokens = torch.tensor(ids or [0] * len(wanted), dtype=torch.int32, device=rows.device)
        self._network.ranks.from_first(tokens)
        self._state.field("tokens")[output.slots[rows].long()] = tokens
        return dict(zip(wanted, found, strict=False))

    def _send(self, drawn: Tensor, by_host: dict[int, Drawn | str]) -> Launched:
        self._host.reverse()
        tokens = self._host[0][: len(drawn)]
        tokens.copy_(drawn, non_blocking=True)
        return Launched(tokens, self._event(), by_host)

    def _event(self) -> torch.cuda.Event | None:
        if self._state.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event


@dataclass(frozen=True, slots=True)
class _StepTensors:
    token_ids: Tensor  # [T] int32; _UNREAD: the token is in the state
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32
    logits_rows: Tensor  # [R] int64


def _step_arrays(chunks: list[Chunk], slots: Int32s) -> tuple[Int32s, Int32s, Int32s, Int32s]:
    """The rows' token ids, positions and slots; the rows that draw, then those that tell of a prompt."""
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
    return token_ids, positions, np.repeat(slots, counts), np.concatenate([drawing, *telling])


def _tell(chunks: list[Chunk], logits: Tensor) -> None:
    """What the last rows say of their prompts."""
    at = 0
    for chunk in chunks:
        if chunk.num_telling:
            tell_prompt(chunk, logits[at : at + chunk.num_telling])
            at += chunk.num_telling


def _by_host(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    params = sequence.request.params
    if host_draws(params):
        return True
    num_drawn = chunk.start + chunk.count - sequence.num_prompt
    return bool(params.stop_token_ids) and num_drawn < params.min_tokens


def _row(chunk: Chunk) -> Row:
    sequence = chunk.sequence
    outputs = sequence.tokens[sequence.num_prompt : chunk.start + chunk.count]
    return Row(sequence.request.params, sequence.request.prompt_token_ids, outputs)
