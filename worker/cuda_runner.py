"""Steps on a GPU: launches a plan and gives back its tokens later, so that the next plan can be launched in between.

A step of single rows that all draw is one replay of a graph (graphs.py), and so are most steps of few rows with
prompts in them (mixed_graphs.py); any other is launched kernel by kernel. Tokens stay on the device from step to step;
the host learns them by a copy of a few bytes. Rows that need more than a graph's sampling (penalties, biases, log
probabilities) go through sampler.py, and a plan with such rows must not be launched before the last step's tokens are
known: `needs_tokens`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.kernels.batch_state_triton import fill_tokens
from diptych.kernels.rope_triton import HeadInputs, rope_append
from diptych.worker.captured import StepOutput
from diptych.worker.decode import Decode, Draw
from diptych.worker.device_state import DeviceState, Int32s, Staging
from diptych.worker.graphs import DecodeGraphs
from diptych.worker.mixed_graphs import MixedGraphs
from diptych.worker.models.cuda_network import CudaNetwork, Rows
from diptych.worker.plan import Chunk, Drawn, StepPlan
from diptych.worker.prefill import Prefill
from diptych.worker.runner import tell_prompt
from diptych.worker.sampler import Row, Sampler
from diptych.worker.slots import SlotMap, host_draws
from diptych.worker.step_arrays import StepArrays, num_single


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
        mixed: MixedGraphs | None = None,
    ) -> None:
        self._network = network
        self._pool = pool
        self._state = state
        self._prefill = prefill
        self._graphs = graphs
        self._mixed = mixed
        self._sampler = sampler
        self._slots = SlotMap(state)
        self._staging = Staging(state.device)
        self._decode = Decode(network.config, state)
        on_gpu = state.device.type == "cuda"
        self._host = [torch.empty(state.num_slots, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self._draw = Draw(state, network.config.eos_token_ids, network.ranks)

    def needs_tokens(self, plan: StepPlan) -> bool:
        """Whether the host must know all tokens so far before the plan can be launched."""
        return any(chunk.num_telling or (chunk.draws and _by_host(chunk)) for chunk in plan.chunks)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        chunks = plan.chunks
        slots = self._slots.place(chunks)
        drawing = [chunk for chunk in chunks if chunk.draws]
        sampled = any(chunk.sequence.request.params.temperature > 0 for chunk in drawing)
        output = self._run(chunks, slots, len(drawing), sampled=sampled)
        if output is None:
            return Launched(None, self._event(), {})
        return self._send(output.drawn, self._draw_on_host(drawing, output))

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

    def _run(self, chunks: list[Chunk], slots: Int32s, num_drawing: int, *, sampled: bool) -> _Output | None:
        """By the first way that takes the chunks. None: nothing draws."""
        graphs, mixed = self._graphs, self._mixed
        if graphs is not None and all(chunk.count == 1 and chunk.draws for chunk in chunks):
            size = graphs.padded(len(chunks))
            if size is not None:
                self._slots.set_rows(slots, size)
                self._state.upload(*self._slots.take_changes())
                return _first(num_drawing, graphs.replay(size, sampled=sampled), self._state.rows)
        self._state.upload(*self._slots.take_changes())
        step = StepArrays.of(chunks, slots)
        if mixed is not None:
            size = mixed.padded(chunks)
            if size is not None:
                draw_slots = mixed.load(size, chunks, step)
                return _first(num_drawing, mixed.replay(size, sampled=sampled), draw_slots)
        return self._compute(chunks, step, num_drawing, sampled=sampled)

    def _compute(
        self, chunks: list[Chunk], arrays: StepArrays, num_drawing: int, *, sampled: bool
    ) -> _Output | None:
        """Kernel by kernel. Rows are in the order of the chunks, single ones first, as the scheduler plans them."""
        token_ids, positions, slots, logits_rows = self._staging.send(
            arrays.token_ids, arrays.positions, arrays.slots, arrays.logits_rows
        )
        step = _StepTensors(token_ids, positions, slots, logits_rows.long())
        fill_tokens(step.token_ids, step.slots, self._state.field("tokens"))
        single = num_single(chunks)
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

        rows = Rows(step.token_ids, attend, step.logits_rows)
        logits = self._network.forward(rows, self._pool)
        _tell(chunks, logits[num_drawing:])
        if num_drawing == 0:
            return None
        logits, drawing = logits[:num_drawing], step.logits_rows[:num_drawing]
        slots, positions = slots[drawing], positions[drawing]
        drawn = self._draw.advance(logits, slots, positions, sampled=sampled)
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
    token_ids: Tensor  # [T] int32; negative: the token is in the state
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32
    logits_rows: Tensor  # [R] int64


def _first(count: int, output: StepOutput, slots: Tensor) -> _Output | None:
    """What the rows that draw left, of `slots`, which come before the padding. None: there are none."""
    return _Output(output.logits[:count], output.drawn[:count], slots[:count]) if count else None


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
