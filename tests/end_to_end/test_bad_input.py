"""Bad input: one clear error that names the field, and nothing else suffers. Through the router and on a worker."""

import io
import subprocess
import sys

import aiohttp
import pytest
from mesh import MODEL

from tests.fakes.ports import free_port

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}

CASES = {
    "unknown model": (COMPLETION, {"model": "gpt-9", "prompt": "x"}, 404, ["gpt-9", MODEL]),
    "empty messages": (CHAT, {"messages": []}, 400, ["messages"]),
    "empty prompt": (COMPLETION, {"prompt": ""}, 400, ["prompt"]),
    "prompt too long": (COMPLETION, {"prompt": "word " * 9000}, 400, ["8191"]),
    "prompt and output too long": (
        COMPLETION,
        {"prompt": "x", "max_tokens": 9000},
        400,
        ["max_tokens", "8191"],
    ),
    "max_tokens 0": (COMPLETION, {"prompt": "x", "max_tokens": 0}, 400, ["max_tokens", "at least 1"]),
    "max_tokens negative": (CHAT, {**HELLO, "max_tokens": -5}, 400, ["max_tokens", "-5"]),
    "unknown field": (CHAT, {**HELLO, "temprature": 1}, 400, ["temprature", "temperature"]),
    "wrong type": (CHAT, {**HELLO, "max_tokens": "ten"}, 400, ["max_tokens", "ten"]),
    "wrong role": (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, ["king", "user"]),
    "temperature out of range": (COMPLETION, {"prompt": "x", "temperature": -1}, 400, ["temperature"]),
    "bias outside the vocabulary": (
        COMPLETION,
        {"prompt": "x", "logit_bias": {"99999999": 1}},
        400,
        ["99999999"],
    ),
    "token outside the vocabulary": (COMPLETION, {"prompt": [1, 99999999]}, 400, ["99999999"]),
    "body not an object": (COMPLETION, [1, 2], 400, ["object"]),
    "stream_options without stream": (
        CHAT,
        {**HELLO, "stream_options": {"include_usage": True}},
        400,
        ["stream_options"],
    ),
}


@pytest.mark.parametrize("server", ["router_shm", "aggregated"])
@pytest.mark.parametrize("case", CASES)
async def test_one_clear_error(servers, server, case):
    path, body, status, words = CASES[case]
    async with (
        aiohttp.ClientSession() as session,
        session.post(servers[server].url + path, json=body) as response,
    ):
        answer = await response.json()
        assert response.status == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert all(word in error["message"] for word in words), error["message"]


@pytest.mark.parametrize("server", ["router_shm", "aggregated"])
async def test_broken_json_and_a_body_over_the_limit(servers, server):
    url = servers[server].url + COMPLETION
    async with aiohttp.ClientSession() as session:
        async with session.post(url, data=b'{"prompt": ') as response:
            assert response.status == 400 and "JSON" in (await response.json())["error"]["message"]
        async with session.post(url, data=io.BytesIO(b" " * (65 * 2**20))) as response:
            assert response.status == 413 and "67108864" in (await response.json())["error"]["message"]
        async with session.post(url, json={"prompt": "fine", "max_tokens": 1}) as response:
            assert response.status == 200


def start(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "diptych.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_one_line(result, *words):
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in result.stderr
    assert all(word in last for word in words), last


def test_a_port_in_use(servers):
    result = start("serve", MODEL, "--host", "127.0.0.1", "--port", str(servers["context"].port))
    assert_one_line(result, str(servers["context"].port), "in use")


def test_a_misspelt_key(tmp_path):
    path = tmp_path / "disagg.yaml"
    path.write_text(
        "hostnme: localhost\ncontext_servers: {urls: ['a:1']}\ngeneration_servers: {urls: ['b:2']}\n"
    )
    assert_one_line(start("disaggregated", "-c", str(path)), "hostnme", "hostname")


def test_a_model_directory_without_config(tmp_path):
    result = start("serve", str(tmp_path), "--port", str(free_port()))
    assert_one_line(result, str(tmp_path), "config.json")


def test_a_truncated_safetensors_file(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = start("serve", str(tmp_path), "--port", str(free_port()))
    assert_one_line(result, "model.safetensors")
