"""A context worker on one GPU and a generation worker on another answer as one worker does."""

import asyncio
import os
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import torch
from mesh import get, mesh
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytestmark = [
    pytest.mark.gpu2,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs"),
]
PROMPT_LENGTHS = (1, 31, 32, 33, 500, 1900)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def write_model(path: Path, **config: Any) -> Path:
    """The shape of SmolLM2-135M, or as `config` says, over a vocabulary of bytes; it has no weights yet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path.mkdir()
    (path / "config.json").write_bytes(orjson.dumps({**CONFIG, **config}))
    (path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    fields = {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_bytes(orjson.dumps(fields))
    return path


@pytest.fixture(scope="module", params=["DEFAULT", "TCP"])
def servers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpus")
    model = str(write_model(folder / "model"))
    options = {
        "load_format": "dummy",
        "device": "cuda",
        "kv_cache_config": {"free_gpu_memory_fraction": 0.3},
        "cache_transceiver_config": {"backend": request.param},
    }
    with mesh(folder) as started:
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        workers = {}
        for name, role, device in (
            ("aggregated", None, "0"),
            ("context", "CONTEXT", "0"),
            ("generation", "GENERATION", "1"),
        ):
            os.environ["CUDA_VISIBLE_DEVICES"] = device  # what each process sees
            workers[name] = started.worker(name, role, model=model, **options)
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        router = started.router("router", [workers["context"]], [workers["generation"]])
        for server in (*workers.values(), router):
            server.wait_ready()
        yield {"transport": {"DEFAULT": "cuda_ipc", "TCP": "tcp"}[request.param], "router": router, **workers}


async def answers(url: str) -> list[list[int]]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def one(length: int) -> list[int]:
            request = {
                "prompt": [(7 * i + length) % 256 for i in range(length)],
                "max_tokens": 24,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            async with session.post(f"{url}/v1/completions", json=request) as response:
                answer = await response.json()
                assert response.status == 200, answer
            tokens: list[int] = answer["choices"][0]["token_ids"]
            return tokens

        return [await one(length) for length in PROMPT_LENGTHS]


def test_two_gpus_answer_as_one(servers):
    expected = asyncio.run(answers(servers["aggregated"].url))
    assert all(len(tokens) == 24 for tokens in expected)
    assert asyncio.run(answers(servers["router"].url)) == expected
    generation = servers["generation"]
    transfers = get(f"{generation.url}/perf_metrics")
    assert [request["transport"] for request in transfers] == [servers["transport"]] * len(PROMPT_LENGTHS)
    for name in ("context", "generation"):
        blocks = servers[name].blocks()
        assert blocks["active"] == blocks["leased"] == 0
