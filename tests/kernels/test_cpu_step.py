"""The CPU step against a float32 model written here, and its promise that a row depends on itself alone."""

import concurrent.futures
import dataclasses
import itertools
import logging

import numpy as np
import pytest
import torch

from diptych.kernels import cpu_build, cpu_step, cpu_tiles
from diptych.kernels.cpu_step import CpuStep, KernelUnavailable, StepShape

ISAS = ("amx", "avx512_bf16", "portable")
POISON = 0x7FFF  # a bf16 NaN
MAX_POSITIONS = 1024

BASE = StepShape(
    num_layers=2,
    hidden_size=96,
    intermediate_size=160,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=211,
    tokens_per_block=32,
    rms_norm_eps=1e-5,
)


@pytest.fixture(params=ISAS)
def any_isa(request, monkeypatch):
    monkeypatch.setenv("DIPTYCH_CPU_ISA", request.param)
    try:
        return cpu_step.isa()
    except KernelUnavailable as reason:
        pytest.skip(str(reason))


def make_weights(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    def vector(size):
        return 1 + 0.1 * torch.randn(size, generator=generator)

    heads = shape.num_heads * shape.head_dim
    qkv = heads + 2 * shape.num_kv_heads * shape.head_dim
    weights = {
        "embed_tokens": torch.randn(shape.vocab_size, shape.hidden_size, generator=generator).bfloat16(),
        "norm": vector(shape.hidden_size),
        "lm_head": matrix(shape.vocab_size, shape.hidden_size),
    }
    for i in range(shape.num_layers):
        weights |= {
            f"layers.{i}.input_norm": vector(shape.hidden_size),
            f"layers.{i}.post_norm": vector(shape.hidden_size),
            f"layers.{i}.qkv": matrix(qkv, shape.hidden_size),
            f"layers.{i}.o": matrix(shape.hidden_size, heads),
            f"layers.{i}.gate_up": matrix(2 * shape.intermediate_size, shape.hidden_size),
            f"layers.{i}.down": matrix(shape.hidden_size, shape.intermediate_size),
        }
        if shape.qkv_bias:
            weights[f"layers.{i}.qkv_bias"] = 0.1 * torch.randn(qkv, generator=generator)
        if shape.qk_norm:
            weights[f"layers.{i}.q_norm"] = vector(shape.head_dim)
            weights[f"layers.{i}.k_norm"] = vector(shape.head_dim)
    return weights


def rotary(shape):
    inverse = 10000.0 ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = torch.arange(MAX_POSITIONS, dtype=torch.float32)[:, None] * inverse
    return angles.cos(), angles.sin()


def rms_norm(x, weight, epsilon):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()


def rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def reference(shape, weights, tokens):
    """Logits of every position of one sequence, in float32."""
    count, dim = len(tokens), shape.head_dim
    cos, sin = (table[:count, None] for table in rotary(shape))
    ages = torch.arange(count)[:, None] - torch.arange(count)
    hidden_from = (ages < 0) | (ages >= (shape.sliding_window or MAX_POSITIONS))
    scale = shape.attention_scale or dim**-0.5
    x = weights["embed_tokens"].float()[torch.tensor(tokens)]
    for i in range(shape.num_layers):
        layer = {
            k.removeprefix(f"layers.{i}."): w.float()
            for k, w in weights.items()
            if k.startswith(f"layers.{i}.")
        }
        qkv = rms_norm(x, layer["input_norm"], shape.rms_norm_eps) @ layer["qkv"].T
        qkv = (qkv + layer["qkv_bias"] if shape.qkv_bias else qkv).view(count, -1, dim)
        q, k, v = qkv.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        if shape.qk_norm:
            q = rms_norm(q, layer["q_norm"], shape.rms_norm_eps)
            k = rms_norm(k, layer["k_norm"], shape.rms_norm_eps)
        k, v = (
            t.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=1)
            for t in (rotate(k, cos, sin), v)
        )
        scores = torch.einsum("qhd,khd->hqk", rotate(q, cos, sin), k) * scale
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden_from, -torch.inf).softmax(-1), v)
        x = x + attended.reshape(count, -1) @ layer["o"].T
        gate, up = (rms_norm(x, layer["post_norm"], shape.rms_norm_eps) @ layer["gate_up"].T).chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * up) @ layer["down"].T
    return rms_norm(x, weights["norm"], shape.rms_norm_eps) @ weights["lm_head"].float().T


class Runner:
    """A CpuStep with a poisoned pool; remembers how many tokens of each sequence are in it."""

    def __init__(self, shape, weights, num_threads=1, num_sequences=4, blocks_per_sequence=8):
        self.step = CpuStep(shape, weights, *rotary(shape), num_threads)
        num_blocks = num_sequences * blocks_per_sequence + 1
        size = (num_blocks, shape.num_layers, 2, shape.num_kv_heads, shape.tokens_per_block, shape.head_dim)
        self.pool = torch.full(size, POISON, dtype=torch.int16).view(torch.bfloat16)
        self.step.bind(self.pool)
        shuffled = np.random.default_rng(1).permutation(num_blocks - 1) + 1
        self.tables = shuffled.astype(np.int32).reshape(num_sequences, blocks_per_sequence)
        self.known = [0] * num_sequences

    def run(self, parts):
        """Feeds {sequence: tokens} in one step; returns {sequence: logits of those tokens}."""
        tokens, positions, owners = [], [], []
        for sequence, new in parts.items():
            tokens += new
            positions += range(self.known[sequence], self.known[sequence] + len(new))
            owners += [sequence] * len(new)
            self.known[sequence] += len(new)
        arrays = [np.array(values, np.int32) for values in (tokens, positions, owners)]
        logits = self.step.forward(*arrays, self.tables, np.arange(len(tokens), dtype=np.int32)).clone()
        return {s: logits[torch.tensor(owners) == s] for s in parts}


@pytest.fixture
def make_runner():
    made = []

    def make(*args, **kwargs):
        made.append(Runner(*args, **kwargs))
        return made[-1]

    yield make
    for runner in made:
        runner.step.close()


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, count).tolist()


def assert_close(actual, expected):
    assert torch.isfinite(actual).all()
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.03, f"relative error up to {error.max():.4f}"


VARIANTS = {
    "base": {},
    "multi_head": {"num_heads": 2},
    "wide_group": {"num_heads": 40, "num_kv_heads": 1, "head_dim": 32},
    "blocks_of_16": {"tokens_per_block": 16},
    "blocks_of_64": {"tokens_per_block": 64},
    "head_dim_96": {"head_dim": 96, "num_heads": 2},
    "head_dim_256": {"head_dim": 256, "num_heads": 4, "num_kv_heads": 1},
    "qwen2": {"qkv_bias": True, "head_dim": 128, "num_heads": 4},
    "qwen3": {"qk_norm": True, "head_dim": 128, "num_heads": 2, "num_kv_heads": 1},
    "window": {"sliding_window": 37},
    "window_blocks_of_16": {"sliding_window": 50, "tokens_per_block": 16},
    "scale": {"attention_scale": 0.05},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_prefill_and_decode_agree_with_a_float32_model(any_isa, make_runner, changes):
    shape = dataclasses.replace(BASE, **changes)
    weights = make_weights(shape)
    tokens = random_tokens(119)
    expected = reference(shape, weights, tokens)
    runner = make_runner(shape, weights)
    cuts = (0, 45, 46, 47, 96, 117, 118, 119)
    parts = [runner.run({2: tokens[start:end]})[2] for start, end in itertools.pairwise(cuts)]
    assert_close(torch.cat(parts), expected)


def test_mixed_batches_agree_with_a_float32_model(any_isa, make_runner):
    weights = make_weights(BASE)
    texts = {s: random_tokens(length, seed=s) for s, length in enumerate((70, 33, 150, 5))}
    runner = make_runner(BASE, weights, num_threads=2)
    steps = [
        {0: slice(0, 69), 1: slice(0, 31)},
        {2: slice(0, 100), 0: slice(69, 70), 1: slice(31, 32)},
        {1: slice(32, 33), 3: slice(0, 5), 2: slice(100, 150)},
    ]
    found = {s: [] for s in texts}
    for step in steps:
        for s, logits in runner.run({s: texts[s][part] for s, part in step.items()}).items():
            found[s].append(logits)
    for s, text in texts.items():
        assert_close(torch.cat(found[s]), reference(BASE, weights, text))


def test_contexts_longer_than_a_chunk(any_isa, make_runner):
    weights = make_weights(BASE)
    tokens = random_tokens(600)
    for shape in (BASE, dataclasses.replace(BASE, sliding_window=300)):
        runner = make_runner(shape, weights, num_sequences=1, blocks_per_sequence=20)
        actual = torch.cat([runner.run({0: tokens[:590]})[0], runner.run({0: tokens[590:]})[0]])
        assert_close(actual, reference(shape, weights, tokens))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 60}, {"tokens_per_block": 16}, {"qk_norm": True}])
def test_a_row_is_bit_identical_in_any_company(any_isa, make_runner, changes):
    shape = dataclasses.replace(BASE, **changes)
    weights = make_weights(shape)
    tokens = random_tokens(300)
    options = {"num_sequences": 4, "blocks_per_sequence": 300 // shape.tokens_per_block + 1}
    whole = make_runner(shape, weights, **options).run({0: tokens})[0]

    one_by_one = make_runner(shape, weights, **options)
    start = one_by_one.run({3: tokens[:250]})[3]
    singles = [one_by_one.run({3: [token]})[3] for token in tokens[250:]]
    assert torch.equal(torch.cat([start, *singles]), whole)

    crowded = make_runner(shape, weights, num_threads=2, **options)
    found, generator = [], np.random.default_rng(5)
    at = 0
    while at < 300:
        size = int(generator.integers(1, 70))
        company = {s: random_tokens(int(generator.integers(1, 40)), seed=at + s) for s in (0, 3) if at < 150}
        found.append(
            crowded.run({0: company.get(0, [1]), 1: tokens[at : at + size], 3: company.get(3, [2])})[1]
        )
        at += size
    assert torch.equal(torch.cat(found), whole)


def test_blocks_shared_with_another_sequence_give_the_same_bits(make_runner):
    weights = make_weights(BASE)
    tokens = random_tokens(130)
    runner = make_runner(BASE, weights)
    whole = runner.run({0: tokens})[0]
    runner.tables[1, :3] = runner.tables[0, :3]
    runner.known[1] = 96
    assert torch.equal(runner.run({1: tokens[96:]})[1], whole[96:])


def test_one_and_two_threads_give_the_same_bits_and_pool(any_isa, make_runner):
    weights = make_weights(BASE)
    runners = [make_runner(BASE, weights, num_threads=threads) for threads in (1, 2, 3)]
    for parts in ({0: random_tokens(100), 1: random_tokens(9)}, {0: [5], 1: [6], 2: random_tokens(64)}):
        results = [runner.run(parts) for runner in runners]
        for other in results[1:]:
            assert all(torch.equal(other[s], logits) for s, logits in results[0].items())
    for runner in runners[1:]:
        assert torch.equal(runner.pool.view(torch.int16), runners[0].pool.view(torch.int16))


def test_only_the_wanted_rows_come_back_in_the_order_asked_for(make_runner):
    runner = make_runner(BASE, make_weights(BASE))
    tokens = np.array(random_tokens(40), np.int32)
    positions, owners = np.arange(40, dtype=np.int32), np.zeros(40, np.int32)
    wanted = np.array([39, 0, 17], np.int32)
    everything = runner.step.forward(tokens, positions, owners, runner.tables, positions).clone()
    assert torch.equal(
        runner.step.forward(tokens, positions, owners, runner.tables, wanted), everything[[39, 0, 17]]
    )
    assert runner.step.forward(tokens, positions, owners, runner.tables, wanted[:0]).shape == (
        0,
        BASE.vocab_size,
    )


def test_the_documented_tile_order_is_the_one_in_the_pool(make_runner):
    shape = dataclasses.replace(BASE, num_layers=1)
    weights = make_weights(shape)
    tokens = random_tokens(40)
    runner = make_runner(shape, weights)
    runner.run({0: tokens})
    rows = cpu_tiles.to_rows(runner.pool[runner.tables[0, :2]])
    embedded = weights["embed_tokens"].float()[torch.tensor(tokens)]
    hidden = rms_norm(embedded, weights["layers.0.input_norm"], shape.rms_norm_eps)
    qkv = (hidden @ weights["layers.0.qkv"].float().T).view(40, -1, shape.head_dim)
    cos, sin = (table[:40, None] for table in rotary(shape))
    expected = torch.stack((rotate(qkv[:, 6:8], cos, sin), qkv[:, 8:10])).transpose(1, 2)
    written = rows[:, 0].movedim(0, 2).flatten(2, 3)[:, :, :40].float()
    torch.testing.assert_close(written, expected, rtol=0.05, atol=0.05)
    assert torch.equal(
        cpu_tiles.from_rows(rows).view(torch.int16), runner.pool[runner.tables[0, :2]].view(torch.int16)
    )


def test_bytes_and_tied_weights_are_accepted(make_runner):
    weights = make_weights(BASE)
    weights["lm_head"] = weights["embed_tokens"]
    runner = make_runner(BASE, weights)
    runner.step.bind(runner.pool.view(torch.uint8))
    tokens = random_tokens(20)
    assert_close(runner.run({0: tokens})[0], reference(BASE, weights, tokens))


BAD_INPUT = {
    "token_ids has values": {"token_ids": [0, 211]},
    "positions has values": {"positions": [255, 256]},
    "positions must rise": {"positions": [4, 4]},
    "sequence_ids has values": {"sequence_ids": [4, 4]},
    "block_tables has values": {"block_tables": [[33, 1]]},
    "logits_rows has values": {"logits_rows": [2]},
    "must have one length": {"positions": [0]},
    "it must be int32 with 2": {"block_tables": [1, 2]},
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_raises_and_names_the_field(make_runner, message):
    runner = make_runner(BASE, make_weights(BASE))
    good = {"token_ids": [1, 2], "positions": [0, 1], "sequence_ids": [0, 0], "logits_rows": [1]}
    arrays = {name: np.array(values, np.int32) for name, values in (good | BAD_INPUT[message]).items()}
    arrays.setdefault("block_tables", runner.tables)
    with pytest.raises(ValueError, match=message):
        runner.step.forward(**arrays)


def test_what_cannot_be_bound_or_built_raises(make_runner):
    weights = make_weights(BASE)
    runner = make_runner(BASE, weights)
    with pytest.raises(ValueError, match="whole blocks"):
        runner.step.bind(torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        runner.step.bind(torch.zeros(4, 4))
    del weights["layers.1.down"]
    with pytest.raises(ValueError, match=r"layers\.1\.down"):
        make_runner(BASE, weights)
    runner.step.close()
    with pytest.raises(ValueError, match="closed"):
        runner.run({0: [1]})


@pytest.mark.parametrize(
    "changes", [{"head_dim": 80}, {"num_heads": 5}, {"tokens_per_block": 48}, {"hidden_size": 100}]
)
def test_supports_names_the_field(changes):
    reason = cpu_step.supports(dataclasses.replace(BASE, **changes))
    assert reason is not None
    assert next(iter(changes)) in reason
    assert cpu_step.supports(BASE) is None


def test_the_build_is_cached_and_safe_to_run_at_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO), concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cpu_build.build("cpu_step.cpp", portable=True), range(2))
        built = first.stat().st_mtime_ns
        messages = len(caplog.records)
        assert cpu_build.build("cpu_step.cpp", portable=True) == first == second
    assert first.stat().st_mtime_ns == built
    assert messages == len(caplog.records) >= 1
    assert caplog.records[0].message.startswith("Compiling the CPU kernels")
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_missing_or_broken_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(KernelUnavailable, match="/nonexistent"):
        cpu_step.isa()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(KernelUnavailable, match="status 1"):
        cpu_step.isa()
    assert not list(tmp_path.iterdir())


def test_an_unknown_isa_is_refused(monkeypatch):
    monkeypatch.setenv("DIPTYCH_CPU_ISA", "mmx")
    with pytest.raises(KernelUnavailable, match="mmx"):
        cpu_step.isa()
