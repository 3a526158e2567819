"""What the GPU's runner says, overlapped and batched, against a plain float32 model given the same tokens before."""

import dataclasses
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from diptych.kernels.flashinfer_attention import AttentionShape, is_installed
from diptych.wire import SamplingParams, Submit
from diptych.worker.blocks import BlockPool
from diptych.worker.device_state import DeviceState
from diptych.worker.models.build import build_model
from diptych.worker.models.config import ModelConfig, RopeConfig
from diptych.worker.models.loader import load_config, load_weights
from diptych.worker.models.weights import DTYPES, dummy_weights
from diptych.worker.plan import SchedulerLimits
from diptych.worker.sampler import Row, Sampler
from diptych.worker.scheduler import Scheduler
from diptych.worker.step import StepBatch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"),
        reason="there is no GPU, and TRITON_INTERPRET is not 1",
    ),
]
NEEDS_FLASHINFER = pytest.mark.skipif(not (ON_GPU and is_installed()), reason="flashinfer is not installed")
BLOCK, NUM_BLOCKS = 16, 64
EOS = frozenset({2})
# The interpreter takes a second for what a GPU does in a microsecond.
LENGTHS = (100, 3, 33, 1, 64, 20, 9) if ON_GPU else (20, 3, 17)
NUM_LAYERS, NUM_TOKENS = (3, 40) if ON_GPU else (1, 5)
MIXED_SIZES = [16, 64, 128] if ON_GPU else [16, 32]


def config_of(dtype, **fields):
    values = {
        "family": "qwen3",
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_layers": NUM_LAYERS,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope": RopeConfig(),
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    return ModelConfig(**{**values, **fields})


def weights_of(config):
    return {name: weight * 5 if weight.ndim > 1 else weight for name, weight in dummy_weights(config).items()}


def test_memory_is_measured_for_each_way_to_compute_prompts(monkeypatch):
    """A gate apart takes more memory than gate and up in one product, of fewer rows too."""
    from diptych.worker.models import cuda_network

    monkeypatch.setattr(cuda_network, "num_multiprocessors", lambda device: 8)
    config = config_of("bfloat16")  # two tiles of gate and up for each 128 rows
    network = cuda_network.CudaNetwork(config, dummy_weights(config), torch.device("cpu"), 512)
    assert network.largest_steps(64) == [64]
    assert network.largest_steps(1024) == [896, 1024]
    assert network.largest_steps(1030) == [1024, 1030]


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "7.5"), ((8, 0), None), ((12, 0), None)])
def test_gpus_that_the_kernels_run_on(capability, reason, monkeypatch):
    from diptych.worker.cuda_computer import unusable

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = unusable(config_of("bfloat16"), torch.device("cuda"))
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


def reference_logits(config, weights, request, outputs):
    """What a float32 model on the CPU says at each output, given the outputs before it: `[outputs, vocab]`."""
    wide = dataclasses.replace(config, dtype="float32")
    model = build_model(
        wide,
        {name: weight.float() for name, weight in weights.items()},
        torch.device("cpu"),
        kernel="torch",
        num_threads=2,
        tokens_per_block=BLOCK,
    )
    shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK, config.head_dim)
    model.bind(torch.full(shape, torch.nan).to(DTYPES[wide.kv_dtype]))
    tokens = [*request.prompt_token_ids, *outputs[:-1]]
    positions = np.arange(len(tokens), dtype=np.int32)
    batch = StepBatch(
        token_ids=np.array(tokens, np.int32),
        positions=positions,
        sequence_ids=np.zeros_like(positions),
        block_tables=np.arange(NUM_BLOCKS, dtype=np.int32)[None],
        logits_rows=positions[len(request.prompt_token_ids) - 1 :],
    )
    return model.forward(batch).clone()


def capture(graphs):
    """On a CPU a replay is the step itself: it reads and writes what a graph does."""
    if ON_GPU:
        graphs.capture(lambda fraction: None)
    else:
        graphs.replay = graphs._step
    return graphs


def cuda_runner(config, weights, *, graphs=ON_GPU, mixed=False, flashinfer=False, sampler=None):
    from diptych.worker.cuda_runner import CudaRunner
    from diptych.worker.graphs import DecodeGraphs
    from diptych.worker.mixed_graphs import MixedGraphs
    from diptych.worker.models.cuda_network import CudaNetwork
    from diptych.worker.prefill import FlashInfer, TritonPrefill

    kv_dtype = DTYPES[config.kv_dtype]
    shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK, config.head_dim)
    pool = torch.full(shape, torch.nan, device=DEVICE).to(kv_dtype)
    with torch.inference_mode():
        network = CudaNetwork(config, dict(weights), DEVICE, config.max_position_embeddings)
        state = DeviceState(8, 32, DEVICE)
        decodes = capture(DecodeGraphs(network, state, pool, [1, 2, 4, 8])) if graphs else None
        prompts = capture(MixedGraphs(network, state, pool, MIXED_SIZES)) if mixed else None
    attention = AttentionShape(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        BLOCK,
        config.head_dim**-0.5,
        config.sliding_window,
        DTYPES[config.dtype],
        kv_dtype,
    )
    prefill = (FlashInfer if flashinfer else TritonPrefill)(attention, DEVICE)
    return CudaRunner(network, pool, state, prefill, decodes, sampler or Sampler(EOS), prompts)


def scheduler_of(max_num_tokens=48 if ON_GPU else 16):
    limits = SchedulerLimits(
        max_batch_size=8,
        max_num_tokens=max_num_tokens,
        max_seq_len=256,
        tokens_per_block=BLOCK,
        eos_token_ids=EOS,
    )
    return Scheduler(limits, BlockPool(NUM_BLOCKS))


def serve(runner, requests, *, scheduler=None, told=None):
    """Everything that comes back for each request, arriving one every second step, each step launched early.

    `told` gets the log probabilities of prompts.
    """
    scheduler = scheduler or scheduler_of()
    found = {request.request_id: [] for request in requests}
    waiting, before = list(requests), None

    def finish(plan, launched):
        commit = scheduler.commit(plan, runner.collect(launched), 0.0)
        for event in (*plan.events, *commit.events):
            assert event.error is None, event
            found[event.request_id] += event.token_ids
            if told is not None and event.prompt_logprobs is not None:
                told[event.request_id] = event.prompt_logprobs

    for step in range(400):
        if waiting and step % 2 == 0:
            scheduler.add(waiting.pop(0), 0.0)
        plan = scheduler.plan(0.0)
        if before is not None and (not plan.chunks or runner.needs_tokens(plan)):
            finish(*before)
            before = None
        launched = (plan, runner.launch(plan)) if plan.chunks else None
        if before is not None:
            finish(*before)
        before = launched
        if not waiting and not scheduler.has_work and before is None:
            scheduler.check()
            return found
    raise AssertionError("it did not end")


def requests_of(params, lengths=LENGTHS):
    draw = np.random.default_rng(0)
    return [
        Submit(
            request_id=str(index),
            prompt_token_ids=draw.integers(3, 131, length).tolist(),
            params=params[index % len(params)],
        )
        for index, length in enumerate(lengths)
    ]


def is_likeliest(logits, token, dtype):
    """Of nearly equal logits, rounding may choose any: plain torch is up to 0.0006 and 0.008 away here."""
    gap = float(logits.max() - logits[token])
    return gap <= {"float16": 0.005, "bfloat16": 0.03}[dtype] * float(logits.max() - logits.mean())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"] if ON_GPU else ["float16"])
@pytest.mark.parametrize(
    "fields",
    [
        {"qk_norm": True},
        {"family": "qwen2", "qkv_bias": True, "tie_word_embeddings": True},
        {"family": "mistral", "sliding_window": 24, "head_dim": 32, "num_heads": 6},
        {"family": "llama", "o_bias": True, "num_kv_heads": 4},
    ],
)
def test_greedy_tokens_are_the_likeliest_in_float32(dtype, fields):
    config = config_of(dtype, **fields)
    check_greedy(config, weights_of(config))


def check_greedy(config, weights, requests=None, scheduler=None, **options):
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    requests = requests or requests_of([params])
    found = serve(cuda_runner(config, weights, **options), requests, scheduler=scheduler)
    for request in requests:
        outputs = found[request.request_id]
        assert len(outputs) == NUM_TOKENS
        expected = reference_logits(config, weights, request, outputs)
        wrong = [
            place
            for place, (logits, token) in enumerate(zip(expected, outputs, strict=True))
            if not is_likeliest(logits, token, config.dtype)
        ]
        assert not wrong, (request.request_id, wrong)


@pytest.mark.parametrize("mixed", [False, True])
def test_prompts_found_in_the_cache(mixed):
    """What is left of such a prompt goes through other kernels: its tokens need not be the same, but as likely."""
    config = config_of("float16", qk_norm=True)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    (first,) = requests_of([params], lengths=(2 * BLOCK + 3,))
    # Of the others a few tokens, and one, are left.
    again = msgspec.structs.replace(first, request_id="again")
    shorter = msgspec.structs.replace(
        first, request_id="shorter", prompt_token_ids=first.prompt_token_ids[: 2 * BLOCK + 1]
    )
    scheduler = scheduler_of()
    check_greedy(config, weights_of(config), [first, again, shorter], scheduler, mixed=mixed)
    assert scheduler.num_cached_tokens == 4 * BLOCK


@NEEDS_FLASHINFER
@pytest.mark.timeout(280)  # the first time it compiles
def test_flashinfer_gives_the_same_tokens():
    config = config_of("bfloat16", qk_norm=True, head_dim=128)
    check_greedy(config, weights_of(config), flashinfer=True)


@pytest.mark.parametrize("mixed", [False, True])
def test_sampled_tokens_and_what_the_host_draws(mixed):
    config = config_of("float16", eos_token_ids=tuple(EOS))
    weights = weights_of(config)
    count = NUM_TOKENS
    params = [
        SamplingParams(max_tokens=count, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=count, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(max_tokens=count, temperature=1.0, top_k=20, min_p=0.01, seed=2**64 - 1),
        SamplingParams(max_tokens=count, temperature=0.0, num_logprobs=2, min_tokens=4),
        SamplingParams(max_tokens=count, temperature=0.7, logit_bias={5: 4.0}, seed=7, min_tokens=count),
        SamplingParams(max_tokens=count, temperature=1.2, seed=5, min_tokens=count),
        SamplingParams(max_tokens=count, temperature=0.0, min_tokens=count, stop_token_ids=[9]),
    ]
    requests = requests_of(params)
    found = serve(cuda_runner(config, weights, mixed=mixed), requests)
    same = total = 0
    for request in requests:
        outputs = found[request.request_id]
        expected = reference_logits(config, weights, request, outputs)
        for place, token in enumerate(outputs):
            row = Row(request.params, request.prompt_token_ids, outputs[:place])
            (drawn,) = Sampler(EOS).sample(expected[place : place + 1].clone(), [row])
            same, total = same + (drawn.token_id == token), total + 1
    # Near a boundary between two tokens, rounding chooses.
    assert same >= 0.95 * total, f"{same} of {total}"


def test_prompts_tell_their_log_probabilities():
    config = config_of("float16")
    weights = weights_of(config)
    params = [
        SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=True, num_logprobs=1),
        SamplingParams(max_tokens=2, temperature=0.0),
    ]
    requests = requests_of(params)
    told = {}
    serve(cuda_runner(config, weights, mixed=True), requests, told=told)
    assert set(told) == {request.request_id for request in requests[::2] if len(request.prompt_token_ids) > 1}
    for request in requests:
        entries = told.get(request.request_id)
        if entries is None:
            continue
        first, *rest = request.prompt_token_ids
        start = msgspec.structs.replace(request, prompt_token_ids=[first])
        expected = reference_logits(config, weights, start, [*rest, 0]).log_softmax(-1)
        assert [entry.token_id for entry in entries] == rest
        wanted = [float(row[token]) for row, token in zip(expected, rest, strict=False)]
        assert [entry.logprob for entry in entries] == pytest.approx(wanted, abs=0.05)


class Recorder(Sampler):
    """Keeps the logits that it draws from."""

    def __init__(self):
        super().__init__(EOS)
        self.logits = []

    def sample(self, logits, rows):
        self.logits.append(logits.clone().cpu())
        return super().sample(logits, rows)


# "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


@pytest.mark.model
@pytest.mark.skipif("DIPTYCH_TEST_MODEL" not in os.environ, reason="DIPTYCH_TEST_MODEL names no GGUF file")
@pytest.mark.parametrize("flashinfer", [False, pytest.param(True, marks=NEEDS_FLASHINFER)])
def test_the_real_model_says_what_float32_says(flashinfer):
    """SmolLM2-135M-Instruct; models/test_small_model.py holds the float32 model to transformers' logits."""
    path = Path(os.environ["DIPTYCH_TEST_MODEL"])
    config = load_config(path)
    weights = load_weights(path, config, lambda fraction: None)
    params = SamplingParams(max_tokens=12, temperature=0.0, num_logprobs=1, ignore_eos=True)
    request = Submit(request_id="0", prompt_token_ids=PROMPT, params=params)
    recorder = Recorder()
    runner = cuda_runner(config, weights, sampler=recorder, flashinfer=flashinfer)
    outputs = serve(runner, [request])["0"]
    expected = reference_logits(config, weights, request, outputs)
    logits = torch.cat(recorder.logits)
    assert float((logits - expected).norm() / expected.norm()) < 0.03
    assert outputs == expected.argmax(-1).tolist()
    greedy = msgspec.structs.replace(
        request, params=SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    )
    assert serve(runner, [greedy])["0"] == outputs, "as the graphs draw them"
