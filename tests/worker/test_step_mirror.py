"""Every rank sees the sequences of rank 0 as they are when a step is launched."""

import random
from dataclasses import dataclass, field

import msgspec
import pytest
from simulation import Simulation, random_prompt

from diptych.worker.plan import Chunk, StepPlan
from diptych.worker.rank_messages import Step
from diptych.worker.sequence import Sequence, Status
from diptych.worker.step_mirror import StepDecoder, StepEncoder


@dataclass
class Mirrored(Simulation):
    encoder: StepEncoder = field(default_factory=StepEncoder)
    decoder: StepDecoder = field(default_factory=StepDecoder)
    twins: dict[Sequence, Sequence] = field(default_factory=dict)
    restarts: int = 0

    def _compute(self, plan: StepPlan):
        step = msgspec.msgpack.decode(msgspec.msgpack.encode(self.encoder.encode(plan)), type=Step)
        self.restarts += sum(note.fresh_blocks for note in step.chunks)
        found = self.decoder.decode(step)
        assert len(found.chunks) == len(plan.chunks)
        for ours, theirs in zip(plan.chunks, found.chunks, strict=True):
            self._compare(ours, theirs)
        for ours, theirs in self.twins.items():
            if ours.status is not Status.DRAINING:
                assert (ours.status is Status.RUNNING) == (theirs.status is Status.RUNNING)
        return super()._compute(plan)

    def _compare(self, ours: Chunk, theirs: Chunk) -> None:
        assert (theirs.start, theirs.count, theirs.draws) == (ours.start, ours.count, ours.draws)
        assert theirs.num_telling == ours.num_telling
        assert theirs.sequence.tokens == ours.sequence.tokens
        assert theirs.sequence.blocks == ours.sequence.blocks
        assert theirs.sequence.request == msgspec.structs.replace(ours.sequence.request, ticket=None)
        # A runner tells sequences, and lists of blocks, apart by what they are.
        assert self.twins.setdefault(ours.sequence, theirs.sequence) is theirs.sequence


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"])
def test_a_rank_has_what_rank_0_has(policy, overlap):
    restarts = 0
    for seed in range(25):
        rng = random.Random(seed)
        simulation = Mirrored(policy=policy, overlap=overlap, num_blocks=10)
        for index in range(12):
            prompt = random_prompt(rng, 1, 20)
            # A name that comes again after its sequence has ended is another sequence.
            name = next((old for old in simulation.events if simulation.reason(old)), f"r{index}")
            simulation.add(name, prompt, max_tokens=rng.randrange(1, 12), tells=rng.random() < 0.3)
            for _ in range(rng.randrange(4)):
                simulation.step()
            if rng.random() < 0.2:
                simulation.scheduler.abort(name)
        simulation.run()
        restarts += simulation.restarts
    assert (restarts > 0) == (policy == "MAX_UTILIZATION"), "preempted sequences got other blocks"


def test_a_rank_forgets_what_has_ended():
    simulation = Mirrored()
    for index in range(6):
        simulation.add(f"r{index}", [index, 1, 2], max_tokens=2)
        simulation.run()
    assert len(simulation.decoder._sequences) == 1, "all but the last, of whose end no step has told"
    assert len(simulation.encoder._told) == 1
