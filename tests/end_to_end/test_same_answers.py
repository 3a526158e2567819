"""Every field of an answer is the same whether one worker or two gave it: streamed and not, all parameters."""

import secrets

import aiohttp
import orjson
import pytest

LONG = "The quick brown fox jumps over the lazy dog. " * 12
GREEDY = {"temperature": 0, "max_tokens": 12}
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Tell me about Paris."}]}

CASES = {
    "one token": (COMPLETION, {"prompt": "Hello", "temperature": 0, "max_tokens": 1}),
    "one token, chat": (CHAT, {**HELLO, "temperature": 0, "max_tokens": 1}),
    "two tokens": (COMPLETION, {"prompt": "Hello", "temperature": 0, "max_tokens": 2}),
    "a whole block": (COMPLETION, {"prompt": list(range(100, 132)), **GREEDY}),
    "one more than a block": (COMPLETION, {"prompt": list(range(100, 133)), **GREEDY}),
    "several prompts": (COMPLETION, {"prompt": ["One", "Two and", LONG], **GREEDY}),
    "n": (COMPLETION, {"prompt": LONG, "n": 3, "temperature": 0.9, "seed": 11, "max_tokens": 10}),
    "seeded": (CHAT, {**HELLO, "temperature": 1.0, "top_p": 0.9, "seed": 5, "max_tokens": 16}),
    "top_k and min_p": (COMPLETION, {"prompt": "Once", "top_k": 20, "min_p": 0.02, "seed": 3, "max_tokens": 16}),
    "penalties": (
        COMPLETION,
        {"prompt": LONG, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, **GREEDY},
    ),
    "logit bias": (COMPLETION, {"prompt": "Hello", "logit_bias": {"198": -100, "28": 5}, **GREEDY}),
    "logprobs": (COMPLETION, {"prompt": "The capital of France is", "logprobs": 3, **GREEDY}),
    "logprobs, chat": (CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2, **GREEDY}),
    "echo": (COMPLETION, {"prompt": "The capital of", "echo": True, **GREEDY}),
    "echo with logprobs": (COMPLETION, {"prompt": "The capital of", "echo": True, "logprobs": 2, **GREEDY}),
    "echo with logprobs of long prompts": (
        COMPLETION,
        {"prompt": [LONG * 3, "😀😃"], "n": 2, "echo": True, "logprobs": 0, "seed": 1, "max_tokens": 3},
    ),
    "echo with logprobs, one token": (
        COMPLETION,
        {"prompt": "A B", "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1},
    ),
    "stop string": (COMPLETION, {"prompt": "1, 2, 3, 4,", "stop": [" 7", "zzz"], "temperature": 0, "max_tokens": 30}),
    "stop string in the first token": (COMPLETION, {"prompt": "The capital of France is", "stop": "Par", **GREEDY}),
    "stop string kept": (
        COMPLETION,
        {"prompt": "1, 2, 3, 4,", "stop": " 7", "include_stop_str_in_output": True, "temperature": 0, "max_tokens": 30},
    ),
    "stop token": (COMPLETION, {"prompt": "The capital of France is", "stop_token_ids": [30], **GREEDY}),
    "the model's own end": (CHAT, {"messages": [{"role": "user", "content": "What is the capital of France?"}],
                                   "temperature": 0, "max_tokens": 60}),
    "min_tokens": (CHAT, {"messages": [{"role": "user", "content": "What is the capital of France?"}],
                          "temperature": 0, "min_tokens": 20, "max_tokens": 25}),
    "ignore_eos": (CHAT, {"messages": [{"role": "user", "content": "What is the capital of France?"}],
                          "temperature": 0, "ignore_eos": True, "max_tokens": 25}),
    "special tokens shown": (CHAT, {**HELLO, "skip_special_tokens": False, "ignore_eos": True, **GREEDY}),
    "truncated prompt": (COMPLETION, {"prompt": LONG, "truncate_prompt_tokens": 7, **GREEDY}),
    "half characters": (COMPLETION, {"prompt": "😀😃😄😁😆", "temperature": 0, "max_tokens": 24}),
}  # fmt: skip


def open_session():
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))


async def ask(server, path, body):
    request = {**body, "cache_salt": secrets.token_hex(8), "return_token_ids": True}
    async with open_session() as session, session.post(server.url + path, json=request) as response:
        answer = await response.json()
        assert response.status == 200, answer
    del answer["id"], answer["created"]
    return answer


async def ask_streaming(server, path, body):
    """The stream, joined: (text, token ids, finish and stop reasons, logprobs) of each choice, and the usage."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    request = {**body, **options, "cache_salt": secrets.token_hex(8)}
    choices, usage, heads = {}, None, set()
    async with open_session() as session, session.post(server.url + path, json=request) as response:
        assert response.status == 200, await response.text()
        events = [line[6:].strip() async for line in response.content if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]"
    for event in map(orjson.loads, events):
        heads.add((event["id"], event["created"], event["model"], event["object"]))
        usage = event.get("usage") or usage
        for piece in event["choices"]:
            choice = choices.setdefault(
                piece["index"], {"text": "", "token_ids": [], "ends": [], "logprobs": [], "roles": 0}
            )
            delta = piece.get("delta", piece)
            choice["roles"] += delta.get("role") == "assistant"
            choice["text"] += delta.get("content", delta.get("text")) or ""
            choice["token_ids"] += piece.get("token_ids") or []
            if piece["finish_reason"]:
                choice["ends"].append((piece["finish_reason"], piece["stop_reason"]))
            if piece["logprobs"]:
                choice["logprobs"].append(piece["logprobs"])
    assert len(heads) == 1
    assert all(len(choice["ends"]) == 1 for choice in choices.values())
    if path == CHAT:
        assert all(choice["roles"] == 1 for choice in choices.values())
    return choices, usage


@pytest.fixture(params=["context_first", "generation_first"])
def apart(servers, request):
    """A router with two workers behind it."""
    return servers["router_shm" if request.param == "context_first" else "router_early"]


@pytest.mark.parametrize("case", CASES)
async def test_whole_answers_are_equal(servers, apart, case):
    path, body = CASES[case]
    assert await ask(apart, path, body) == await ask(servers["aggregated"], path, body)


@pytest.mark.parametrize("case", CASES)
async def test_streams_are_equal_and_say_what_the_whole_answer_says(servers, apart, case):
    path, body = CASES[case]
    separate = await ask_streaming(apart, path, body)
    together = await ask_streaming(servers["aggregated"], path, body)
    whole = await ask(servers["aggregated"], path, body)
    for choices, usage in (separate, together):
        assert usage == whole["usage"]
        for choice in whole["choices"]:
            streamed = choices[choice["index"]]
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            assert streamed["text"] == text
            assert streamed["token_ids"] == choice["token_ids"]
            assert streamed["ends"] == [(choice["finish_reason"], choice["stop_reason"])]
            assert joined(streamed["logprobs"]) == (choice["logprobs"] or {})


def joined(parts):
    """Log probabilities of several chunks as those of one answer."""
    result = {}
    for part in parts:
        for key, values in part.items():
            if values is None:
                result.setdefault(key, None)
            else:
                result[key] = [*(result.get(key) or []), *values]
    return result


async def test_an_echo_tells_of_the_prompt_what_was_told_when_it_was_drawn(servers):
    """Also when all of it is in the prefix cache: logits are not."""
    prompt = list(range(1000, 1070))
    body = {"prompt": prompt, "logprobs": 2, "temperature": 0, "max_tokens": 40}
    drawn = (await ask(servers["aggregated"], COMPLETION, body))["choices"][0]
    again = {
        "prompt": prompt + drawn["token_ids"],
        "logprobs": 2,
        "echo": True,
        "max_tokens": 1,
        "cache_salt": "x",
    }
    for _ in range(2):
        async with (
            open_session() as session,
            session.post(servers["aggregated"].url + COMPLETION, json=again) as response,
        ):
            answer = await response.json()
        told = answer["choices"][0]["logprobs"]
        assert len(told["tokens"]) == len(prompt) + 40 + 1
        for key in ("tokens", "token_logprobs", "top_logprobs"):
            assert told[key][len(prompt) : -1] == drawn["logprobs"][key]
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
