"""The rows of a step, as the device gets them."""

import numpy as np

from diptych.wire import SamplingParams, Submit
from diptych.worker.plan import Chunk
from diptych.worker.sequence import Sequence
from diptych.worker.step_arrays import StepArrays, num_single


def chunk(prompt, start, count, *, draws=True, tells=False):
    params = SamplingParams(max_tokens=1, prompt_logprobs=tells)
    sequence = Sequence(Submit(request_id="0", prompt_token_ids=prompt, params=params), 0.0)
    return Chunk(sequence, start, count, draws)


def test_rows_are_in_the_order_of_the_chunks():
    chunks = [
        chunk([5, 6, 7], 3, 1),  # its token is drawn by a step under way
        chunk([8, 9], 1, 1),
        chunk([11, 12, 13, 14], 1, 2, draws=False),
        chunk([15, 16, 17], 0, 3, tells=True),
    ]
    step = StepArrays.of(chunks, np.array([4, 0, 7, 2], np.int32))
    assert step.token_ids[0] < 0
    assert step.token_ids[1:].tolist() == [9, 12, 13, 15, 16, 17]
    assert step.positions.tolist() == [3, 1, 1, 2, 0, 1, 2]
    assert step.slots.tolist() == [4, 0, 7, 7, 2, 2, 2]
    assert step.logits_rows.tolist() == [0, 1, 6, 4, 5], "those that draw, then those that tell"
    assert all(getattr(step, name).dtype == np.int32 for name in StepArrays.__dataclass_fields__)


def test_single_rows_are_those_before_the_first_chunk_of_several():
    one, more = chunk([5, 6], 1, 1), chunk([5, 6], 0, 2)
    assert num_single([]) == 0
    assert num_single([one, one]) == 2
    assert num_single([one, more, one]) == 1
