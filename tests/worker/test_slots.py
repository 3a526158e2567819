"""Only what changed goes to the device, and what is there is what the step needs."""

import numpy as np
import pytest
import torch

from diptych.wire import SamplingParams, Submit
from diptych.worker.device_state import DeviceState, Staging, pieces, room
from diptych.worker.plan import Chunk
from diptych.worker.sequence import Sequence, Status
from diptych.worker.slots import SlotMap

CPU = torch.device("cpu")


class Device:
    """A slot map with its state; `place` uploads and says how many numbers that took."""

    def __init__(self, num_slots=3):
        self.state = DeviceState(num_slots, 4, CPU)
        self.slots = SlotMap(self.state)

    def place(self, *chunks, padded=None):
        slots = self.slots.place(list(chunks))
        if padded is not None:
            self.slots.set_rows(slots, padded)
        indices, values = self.slots.take_changes()
        self.state.upload(indices, values)
        return slots.tolist(), len(indices)

    def of(self, name, slot):
        return self.state.field(name)[slot].item()


def sequence(name, num_prompt=5, blocks=(7,), **params):
    submit = Submit(
        request_id=name,
        prompt_token_ids=list(range(10, 10 + num_prompt)),
        params=SamplingParams(max_tokens=9, **params),
    )
    made = Sequence(submit, 0.0)
    made.blocks = list(blocks)
    made.status = Status.RUNNING
    return made


def decode(made, position):
    return Chunk(made, position, 1, draws=True)


def test_a_new_sequence_brings_its_parameters_and_blocks():
    device = Device()
    made = sequence("a", blocks=(7, 3), temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, seed=2**63 + 5)
    (slot,), _ = device.place(Chunk(made, 0, 5, draws=True))
    assert device.state.tables[slot, :2].tolist() == [7, 3]
    assert device.of("prompt_lengths", slot) == 5 and device.of("top_k", slot) == 4
    assert device.of("temperature", slot) == 0.5 and device.of("top_p", slot) == pytest.approx(0.9)
    assert device.of("min_p", slot) == pytest.approx(0.1)
    words = device.of("seed_low", slot) % 2**32, device.of("seed_high", slot) % 2**32
    assert words == (5, 2**31)


def test_a_steady_decode_uploads_nothing_but_new_blocks():
    device = Device()
    made = sequence("a")
    device.place(Chunk(made, 0, 5, draws=True))
    assert device.place(decode(made, 5), padded=2)[1] == 1, "its row"
    assert device.place(decode(made, 6), padded=2)[1] == 0
    made.blocks.append(9)
    (slot,), count = device.place(decode(made, 7), padded=2)
    assert count == 1 and device.state.tables[slot, :2].tolist() == [7, 9]
    assert device.state.rows[:2].tolist() == [slot, -1]


def test_a_token_that_the_device_did_not_draw_is_uploaded():
    """The first decode after a fetch, or of a prompt that is cached but for its last token."""
    device = Device()
    made = sequence("a")
    (slot,), _ = device.place(decode(made, 4))
    assert (device.of("tokens", slot), device.of("positions", slot)) == (14, 4)


def test_after_a_preemption_the_table_is_written_anew():
    device = Device()
    made = sequence("a", blocks=(7, 3))
    (slot,), _ = device.place(Chunk(made, 0, 5, draws=True))
    made.blocks = [1, 2]
    device.place(Chunk(made, 0, 5, draws=True))
    assert device.state.tables[slot, :2].tolist() == [1, 2]


def test_slots_of_the_gone_are_given_on():
    device = Device(num_slots=2)
    gone, stays, new = (sequence(name) for name in ("gone", "stays", "new"))
    first, _ = device.place(decode(gone, 4), decode(stays, 4))
    gone.status = Status.FINISHED
    (slot,), _ = device.place(decode(new, 4))
    assert slot == first[0]
    assert device.place(decode(stays, 5))[0] == [first[1]]


def test_an_ended_sequence_keeps_its_slot_while_it_is_planned():
    device = Device(num_slots=2)
    ended, other, new = (sequence(name) for name in ("ended", "other", "new"))
    first, _ = device.place(decode(ended, 4), decode(other, 4))
    ended.status = other.status = Status.DRAINING
    slots, _ = device.place(decode(new, 4), decode(ended, 5))
    assert slots == [first[1], first[0]]


def test_an_id_that_comes_again_is_another_sequence():
    device = Device(num_slots=1)
    device.place(decode(sequence("a", num_prompt=5), 4))
    (slot,), _ = device.place(decode(sequence("a", num_prompt=3), 2))
    assert device.of("prompt_lengths", slot) == 3 and device.of("positions", slot) == 2


def test_staged_arrays_arrive_whole_and_aligned():
    staging = Staging(CPU)
    arrays = [np.arange(count, dtype=np.int32) + count for count in (1, 5, 0, 4000)]
    for _ in range(3):
        sent = staging.send(*arrays)
        assert all(torch.equal(got, torch.from_numpy(array)) for got, array in zip(sent, arrays, strict=True))
        assert all(got.data_ptr() % 16 == sent[0].data_ptr() % 16 for got in sent)


def test_staged_arrays_go_into_the_pieces_of_memory_that_lies_still():
    staging, counts = Staging(CPU), [3, 0, 5]
    numbers = torch.zeros(room(counts), dtype=torch.int32)
    for _ in range(3):
        arrays = [np.arange(count, dtype=np.int32) + count for count in counts]
        staging.send_into(numbers, *arrays)
        got = pieces(numbers, counts)
        assert all(torch.equal(one, torch.from_numpy(array)) for one, array in zip(got, arrays, strict=True))
