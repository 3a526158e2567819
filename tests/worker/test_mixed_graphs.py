"""Steps with prompts in them, replayed as graphs, against the same steps launched kernel by kernel.

What a kernel does not write is poisoned: fresh memory holds numbers that are none, and so does the whole KV pool.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the module's kernels need Triton")

from diptych.wire import SamplingParams, Submit
from diptych.worker.mixed_graphs import MAX_ROWS, mixed_sizes
from diptych.worker.models.quantization import Quantization
from diptych.worker.plan import Chunk, StepPlan
from diptych.worker.precision import has_fp8
from diptych.worker.sequence import Sequence, Status
from tests.worker import test_cuda_runner
from tests.worker.test_cuda_runner import (
    BLOCK,
    DEVICE,
    ON_GPU,
    check_greedy,
    config_of,
    cuda_runner,
    weights_of,
)


def needs_kernels(test):
    for mark in test_cuda_runner.pytestmark:
        test = mark(test)
    return test


PROMPTS = {"a": 20, "b": 3, "c": 13, "d": 6, "e": 1, "f": 2, "g": 30, "h": 70}
PARAMS = {
    "b": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "c": {"temperature": 0.0, "repetition_penalty": 1.3},  # drawn by the host
    "e": {"temperature": 1.1, "seed": 5},
    "f": {"temperature": 0.0, "num_logprobs": 1},
}
# What a step computes: of which sequence how many tokens. Those that reach the end of what is known draw.
STEPS = [
    [("a", 20), ("b", 3), ("c", 9)],
    [("a", 1), ("b", 1), ("c", 4)],
    [("a", 1), ("b", 1), ("c", 1), ("d", 1)],
    [("b", 1), ("a", 1), ("d", 5), ("e", 1), ("f", 2)],
    [("g", 7)],
    [("d", 1), ("e", 1), ("g", 16)],
    [("g", 7)],
    [("f", 1), ("g", 1), ("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 1)],
    *([[("a", 1), ("h", 70)]] if ON_GPU else []),  # more rows than one run has
]


@pytest.fixture
def _poisoned(monkeypatch):
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poisoned(make):
        def fresh(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return fresh

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))


class Side:
    """A runner, and its own copies of all sequences."""

    def __init__(self, runner, seed, blocks):
        self.runner = runner
        self.sequences = {}
        self._done = {}
        draw = np.random.default_rng(seed)
        for name, length in PROMPTS.items():
            submit = Submit(
                request_id=f"{seed}-{name}",
                prompt_token_ids=draw.integers(3, 131, length).tolist(),
                params=SamplingParams(
                    **{"max_tokens": 9, "temperature": 0.0, "ignore_eos": True, **PARAMS.get(name, {})}
                ),
            )
            sequence = Sequence(submit, 0.0)
            sequence.status = Status.RUNNING
            sequence.blocks = [next(blocks) for _ in range(-(-(length + len(STEPS)) // BLOCK))]
            self.sequences[name], self._done[name] = sequence, 0

    def run(self, step):
        """The chunks that draw, and their tokens."""
        chunks = []
        for name, count in step:
            sequence, start = self.sequences[name], self._done[name]
            self._done[name] += count
            chunks.append(Chunk(sequence, start, count, draws=start + count >= sequence.num_prompt))
        drawing = [chunk for chunk in chunks if chunk.draws]
        drawn = self.runner.collect(self.runner.launch(StepPlan(chunks)))
        assert len(drawn) == len(drawing)
        return drawing, [token.token_id for token in drawn]

    def know(self, drawing, tokens):
        """Some of the tokens, as a host does that is a step behind: the others are on the device alone."""
        for chunk, token in zip(drawing, tokens, strict=True):
            if chunk.sequence.request.params.temperature == 0.0:
                chunk.sequence.tokens.append(token)

    def finish(self):
        for sequence in self.sequences.values():
            sequence.status = Status.FINISHED


def recorded(runner, logits):
    """Keeps what its tokens are drawn from."""
    draw = runner._draw_on_host

    def drawing(chunks, output):
        logits.append(output.logits.clone())
        return draw(chunks, output)

    runner._draw_on_host = drawing
    return runner


def never(*args, **options):
    raise AssertionError("the step was launched kernel by kernel")


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@needs_kernels
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"qk_norm": True}, 0.01),
        ({"family": "mistral", "sliding_window": 8, "head_dim": 32, "num_heads": 6}, 0.01),
        ({"family": "llama", "o_bias": True, "num_kv_heads": 4}, 0.01),
        pytest.param(
            {"quantization": Quantization(fp8_kv=True)},
            0.1,  # rounding may take another of its few numbers
            marks=pytest.mark.skipif(
                ON_GPU and not has_fp8(DEVICE), reason="this GPU does not compute with FP8"
            ),
        ),
    ],
)
def test_graphs_do_what_the_kernels_do_one_by_one(fields, tolerance):
    config = config_of("float16", **fields)
    weights = weights_of(config)
    found, expected = [], []
    graphs = recorded(cuda_runner(config, weights, mixed=True), found)
    plain = recorded(cuda_runner(config, weights, graphs=False), expected)
    graphs._compute = never
    same = total = 0
    for seed in range(2 if ON_GPU else 1):
        blocks = list(range(1, 32))  # not block 0, which the tables of unused slots name
        sides = [Side(runner, seed, iter(blocks)) for runner in (graphs, plain)]
        for step in STEPS:
            (drawing, tokens), (plain_drawing, wanted) = (side.run(step) for side in sides)
            same += sum(token == other for token, other in zip(tokens, wanted, strict=True))
            total += len(tokens)
            # Both go on with the same ones.
            sides[0].know(drawing, tokens)
            sides[1].know(plain_drawing, tokens)
            with torch.inference_mode():
                plain._state.field("tokens").copy_(graphs._state.field("tokens"))
        for side in sides:
            side.finish()
    assert same >= 0.9 * total, f"{same} of {total}: rounding decides between near ones, and not often"
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.shape == wanted.shape
        assert error(actual, wanted) < tolerance
    assert torch.equal(graphs._state.field("positions"), plain._state.field("positions"))
    pools = [runner._pool.float() for runner in (graphs, plain)]
    assert torch.equal(*(pool.isnan() for pool in pools)), "the same places were written"
    assert pools[0][0].isnan().all()
    assert error(*(pool.nan_to_num() for pool in pools)) < tolerance


@needs_kernels
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    "fields", [{"qk_norm": True}, {"family": "mistral", "sliding_window": 24, "head_dim": 32}]
)
def test_greedy_tokens_are_the_likeliest_in_float32(fields, monkeypatch):
    """As the engine runs it: prompts in pieces, beside decodes, each step launched before the last one is read."""
    from diptych.worker.cuda_runner import CudaRunner

    monkeypatch.setattr(CudaRunner, "_compute", never)
    config = config_of("float16", **fields)
    check_greedy(config, weights_of(config), mixed=True)


@pytest.fixture(scope="module")
def mixed():
    return cuda_runner(config_of("float16"), weights_of(config_of("float16")), mixed=True)._mixed


def chunk(start, count, *, draws=True, tells=False):
    params = SamplingParams(max_tokens=1, prompt_logprobs=tells)
    prompt = [5] * (start + count + (not draws))
    return Chunk(
        Sequence(Submit(request_id="0", prompt_token_ids=prompt, params=params), 0.0), start, count, draws
    )


@needs_kernels
@pytest.mark.parametrize(
    ("chunks", "size"),
    [
        ([chunk(0, 2)], 16),
        ([chunk(0, 16)], 16),
        ([chunk(7, 1), chunk(0, 16)], "next"),
        ([chunk(7, 1), chunk(0, 9, draws=False)], 16),
        ([chunk(0, 3)] * 4, 16),
        ([chunk(0, 3)] * 5, 64 if ON_GPU else None),  # more runs than a graph of 16 rows has
        ([chunk(7, 1)] * 8, 16),
        ([chunk(7, 1)] * 9, None),  # more than there are slots
        ([chunk(0, 129)], None),
        ([chunk(2040, 8)], 16),
        ([chunk(2040, 9)], None),
        ([chunk(8191, 1), chunk(0, 2)], 16),
        ([chunk(8192, 1), chunk(0, 2)], None),
        ([chunk(0, 9, tells=True)], None),
    ],
)
def test_a_step_takes_the_smallest_graph_that_it_fits(mixed, chunks, size):
    assert mixed.padded(chunks) == (mixed.sizes[1] if size == "next" else size)


@needs_kernels
def test_a_step_that_fits_no_graph_is_computed_without():
    config = config_of("float16")
    runner = cuda_runner(config, weights_of(config), mixed=True)
    side = Side(runner, 0, iter(range(1, 32)))
    runner._mixed.padded = lambda chunks: None
    runner._mixed.load = never
    assert len(side.run(STEPS[0])[1]) == 2


@pytest.mark.parametrize("largest", [1, 16, 20, 64, 100, 512, 8192])
def test_sizes_end_with_the_largest_step(largest):
    sizes = mixed_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(largest, MAX_ROWS)
    assert largest < 64 or 64 in sizes, "padding must not make FP8 activations of full ones"
