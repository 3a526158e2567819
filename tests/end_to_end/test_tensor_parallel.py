"""Workers of two ranks: the same tokens as one rank gives, alone and as either half of a disaggregated pair."""

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp
import pytest
import torch
from mesh import mesh, wait_for
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = "smollm2-135m-instruct"
PROMPTS = ["The capital of France is", "Once upon a time there was a princess who " * 12, "2 + 2 ="]
NUM_TOKENS = 24
OPTIONS = {
    "tokenizer": TOKENIZER,
    "max_seq_len": 512,
    "kv_cache_config": {"max_tokens": 4096, "tokens_per_block": 16},
    "num_threads": 1,
}
PAIRS = {"two to one": ("two", "one"), "one to two": ("one", "two"), "two to two": ("two", "other two")}


@pytest.fixture(scope="module")
def checkpoint(small_model, tmp_path_factory) -> Path:
    """A random Llama in float32, so that a sum over ranks is as good as equal, with the small model's vocabulary."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=1,
        dtype="float32",
    )
    path = tmp_path_factory.mktemp("random-llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def servers(checkpoint, tmp_path_factory):
    with mesh(tmp_path_factory.mktemp("ranks")) as started:
        workers = {
            name: started.worker(name, model=str(checkpoint), tensor_parallel_size=size, **OPTIONS)
            for name, size in (("one", 1), ("two", 2), ("other two", 2))
        }
        for worker in workers.values():
            worker.wait_ready()
        routers = {
            name: started.router(name, [workers[context]], [workers[generation]])
            for name, (context, generation) in PAIRS.items()
        }
        routers["early"] = started.router(
            "early", [workers["two"]], [workers["other two"]], schedule_style="generation_first"
        )
        for router in routers.values():
            router.wait_ready()
        yield {**workers, **routers}


async def generate(url, prompt, salt, expected_status=(200,), **settings):
    """The tokens, or the whole answer when another status was expected."""
    body = {
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": salt,
        **settings,
    }
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session,
        session.post(f"{url}/v1/completions", json=body) as response,
    ):
        answer = await response.json()
        assert response.status in expected_status, answer
        return answer["choices"][0]["token_ids"] if response.status == 200 else answer


async def together(url, salt, **settings):
    return await asyncio.gather(*(generate(url, prompt, salt, **settings) for prompt in PROMPTS))


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}], ids=["greedy", "drawn"]
)
async def test_two_ranks_give_the_tokens_of_one(servers, settings):
    expected = await together(servers["one"].url, "a", **settings)
    assert await together(servers["two"].url, "a", **settings) == expected
    assert await together(servers["two"].url, "a", **settings) == expected, "with what is in the prefix cache"


@pytest.mark.parametrize("pair", PAIRS)
async def test_kv_moves_between_workers_of_any_number_of_ranks(servers, pair):
    generation = servers[PAIRS[pair][1]]
    expected = await together(servers["one"].url, "a")
    before = generation.metric("diptych_kv_fetches_total")
    assert await together(servers[pair].url, pair) == expected
    fetches = before + len(PROMPTS)
    wait_for("all fetches counted", lambda: generation.metric("diptych_kv_fetches_total") == fetches, 10)


async def test_a_prefill_of_two_ranks_is_followed_by_two(servers):
    generation = servers["other two"]
    expected = await together(servers["one"].url, "a")
    before = generation.metric("diptych_handovers_total")
    assert await together(servers["early"].url, "early") == expected
    handovers = before + len(PROMPTS)
    wait_for("all handovers counted", lambda: generation.metric("diptych_handovers_total") == handovers, 10)


async def test_blocks_are_all_free_afterwards(servers):
    for name in ("one", "two", "other two"):
        worker = servers[name]
        wait_for(f"idle: {name}", lambda worker=worker: _is_idle(worker.blocks()), 15)
        assert "not conserved" not in worker.tail()


def _is_idle(blocks: dict[str, float]) -> bool:
    return blocks["active"] == blocks["leased"] == 0 and sum(blocks.values()) == 256


def test_more_ranks_than_the_heads_allow_are_refused_in_one_sentence(checkpoint, tmp_path):
    with mesh(tmp_path) as started:
        worker = started.worker("three", model=str(checkpoint), tensor_parallel_size=3, **OPTIONS)
        assert worker.process.wait(120) != 0
        assert "tensor_parallel_size is 3, and this model has 4 attention heads" in worker.tail()
        assert "it can be cut into 1, 2, 4" in worker.tail()
        assert "Traceback" not in worker.tail()


async def test_a_rank_that_dies_takes_its_worker_down_at_once(checkpoint, tmp_path):
    with mesh(tmp_path) as started:
        worker = started.worker("two", model=str(checkpoint), tensor_parallel_size=2, **OPTIONS).wait_ready()
        engine, rank = _ranks(worker.process.pid)
        request = asyncio.create_task(
            generate(worker.url, PROMPTS[0], "", max_tokens=400, expected_status=(500, 503))
        )
        await asyncio.to_thread(
            wait_for, "it runs", lambda: worker.metric("diptych_kv_blocks", state="active") > 0, 30
        )
        os.kill(rank, signal.SIGKILL)
        died_at = time.monotonic()
        assert "engine process ended" in (await asyncio.wait_for(request, 30))["error"]["message"]
        assert worker.process.wait(30) != 0
        assert time.monotonic() - died_at < 30
        assert "rank 1 of the engine was killed by SIGKILL" in worker.tail()
        assert "Traceback" not in worker.tail()
        wait_for("no process is left", lambda: not any(map(_is_alive, (engine, rank))), 10)


async def test_a_rank_that_hangs_takes_its_worker_down_in_the_end(checkpoint, tmp_path):
    """The others wait for it in the middle of a step."""
    with mesh(tmp_path) as started:
        options = {**OPTIONS, "stall_timeout_s": 2, "hang_timeout_s": 6}
        worker = started.worker("two", model=str(checkpoint), tensor_parallel_size=2, **options).wait_ready()
        engine, rank = _ranks(worker.process.pid)
        os.kill(rank, signal.SIGSTOP)
        answer = await asyncio.wait_for(
            generate(worker.url, PROMPTS[0], "", max_tokens=40, expected_status=(500, 503)), 60
        )
        assert "engine process ended" in answer["error"]["message"]
        assert await asyncio.to_thread(worker.process.wait, 30) != 0
        assert "the engine process has hung for" in worker.tail()
        wait_for("no process is left", lambda: not any(map(_is_alive, (engine, rank))), 10)


def test_a_rank_that_cannot_start_is_named(checkpoint, tmp_path):
    with mesh(tmp_path) as started:
        worker = started.worker("two", model=str(checkpoint), tensor_parallel_size=2, **OPTIONS)
        _, rank = wait_for("the second rank", lambda: _ranks(worker.process.pid), 60)
        os.kill(rank, signal.SIGKILL)
        assert worker.process.wait(30) != 0
        assert "rank 1 of the engine was killed by SIGKILL" in worker.tail()


def _children(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def _ranks(pid: int) -> tuple[int, int] | None:
    """Process ids of a worker's rank 0 and rank 1."""
    for engine in _children(pid):
        for rank in _children(engine):
            return engine, rank
    return None


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
