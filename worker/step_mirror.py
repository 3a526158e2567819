"""Gives every rank the plan that the scheduler made on rank 0.

A rank keeps copies of the running sequences; a step brings what has changed of them. So the runner of every rank
takes the same plan, and makes the same decisions from it.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from diptych.worker.engine import Runner
from diptych.worker.plan import Chunk, Drawn, StepPlan
from diptych.worker.rank_messages import ChunkNote, Step
from diptych.worker.sequence import Sequence, Status

L = TypeVar("L")


class StepSink(Protocol):
    def send_step(self, step: Step) -> None: ...
    def step_done(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Told:
    number: int
    sequence: Sequence
    blocks: list[int]  # the very list of the sequence: after a preemption it has another
    num_blocks: int = 0
    num_tokens: int = 0
    runs: bool = True


class StepEncoder:
    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}
        self._next_number = 0

    def encode(self, plan: StepPlan) -> Step:
        idle, gone = self._departures()
        return Step([self._note(chunk, gone) for chunk in plan.chunks], idle, gone)

    def _departures(self) -> tuple[list[int], list[int]]:
        idle, gone = [], []
        for told in list(self._told.values()):
            status = told.sequence.status
            if status is Status.FINISHED:
                gone.append(told.number)
                del self._told[told.sequence.id]
            elif told.runs and status is not Status.RUNNING:
                told.runs = False
                idle.append(told.number)
        return idle, gone

    def _note(self, chunk: Chunk, gone: list[int]) -> ChunkNote:
        sequence = chunk.sequence
        told = self._told.get(sequence.id)
        is_new = told is None or told.sequence is not sequence  # an id may come again
        if told is None or is_new:
            if told is not None:
                gone.append(told.number)
            told = self._told[sequence.id] = _Told(self._next_number, sequence, sequence.blocks)
            told.num_tokens = sequence.num_prompt + len(sequence.request.output_token_ids)
            self._next_number += 1
        fresh_blocks = told.blocks is not sequence.blocks
        if fresh_blocks:
            told.blocks, told.num_blocks = sequence.blocks, 0
        note = ChunkNote(
            told.number,
            chunk.start,
            chunk.count,
            chunk.draws,
            sequence.tokens[told.num_tokens :],
            sequence.blocks[told.num_blocks :],
            fresh_blocks,
            msgspec.structs.replace(sequence.request, ticket=None) if is_new else None,
        )
        told.num_tokens, told.num_blocks, told.runs = len(sequence.tokens), len(sequence.blocks), True
        return note


class StepDecoder:
    """A rank's copies of sequences: what its runner looks at, and no more."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}

    def decode(self, step: Step) -> StepPlan:
        for number in step.idle:
            self._sequences[number].status = Status.WAITING
        for number in step.gone:
            self._sequences.pop(number).status = Status.FINISHED
        return StepPlan([self._chunk(note) for note in step.chunks])

    def _chunk(self, note: ChunkNote) -> Chunk:
        if note.submit is not None:
            self._sequences[note.number] = Sequence(note.submit, 0.0)
        sequence = self._sequences[note.number]
        sequence.status = Status.RUNNING
        sequence.tokens += note.tokens
        if note.fresh_blocks:
            sequence.blocks = list(note.blocks)
        else:
            sequence.blocks += note.blocks
        # That the first token was drawn ends what is told of the prompt.
        sequence.first_token_sent = sequence.num_outputs > len(sequence.request.output_token_ids)
        return Chunk(sequence, note.start, note.count, note.draws)


class LeadingRunner(Generic[L]):
    """Rank 0's runner: what it launches, all ranks launch."""

    def __init__(self, runner: Runner[L], ranks: StepSink) -> None:
        self._runner = runner
        self._ranks = ranks
        self._encoder = StepEncoder()

    def needs_tokens(self, plan: StepPlan) -> bool:
        return self._runner.needs_tokens(plan)

    def launch(self, plan: StepPlan) -> L:
        self._ranks.send_step(self._encoder.encode(plan))
        return self._runner.launch(plan)

    def collect(self, launched: L) -> list[Drawn | str]:
        drawn = self._runner.collect(launched)
        self._ranks.step_done()
        return drawn
