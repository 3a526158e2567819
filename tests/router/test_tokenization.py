"""The router's token ids are the workers', or there are none and the log says why."""

import logging

import orjson
import pytest

from diptych.block_hash import block_keys
from diptych.openai import parse_chat, parse_completion
from diptych.router.probe import TextRules
from diptych.router.tokenization import PromptReader
from diptych.text import Tokenizer
from diptych.worker.prompts import tokenize_prompts
from tests.diptych.text.conftest import byte_level_backend, write_directory

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OTHER_TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("tokenizer"), byte_level_backend())


@pytest.fixture(scope="module")
def rules(directory):
    return TextRules(str(directory), Tokenizer.load(directory).fingerprint, None)


@pytest.fixture
async def reader():
    reader = PromptReader([])
    yield reader
    await reader.close()


MESSAGES = [
    {"role": "system", "content": "naïve café"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
]
BODIES = [
    (COMPLETIONS, {"prompt": "the cat sat on the mat"}),
    (COMPLETIONS, {"prompt": ["hello world", "Stop! stop"], "n": 2}),
    (COMPLETIONS, {"prompt": "hello", "add_special_tokens": False}),
    (COMPLETIONS, {"prompt": "the cat sat on the mat", "truncate_prompt_tokens": 3}),
    (COMPLETIONS, {"prompt": [5, 6, 7]}),
    (COMPLETIONS, {"prompt": [[5, 6], [7]]}),
    (CHAT, {"messages": MESSAGES}),
    (CHAT, {"messages": MESSAGES, "add_generation_prompt": False}),
    (CHAT, {"messages": MESSAGES, "chat_template": OTHER_TEMPLATE}),
    (CHAT, {"messages": MESSAGES, "prompt_token_ids": [1, 2, 3]}),
]


@pytest.mark.parametrize("template", [None, OTHER_TEMPLATE], ids=["own", "server's"])
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_the_ids_are_those_of_a_worker(reader, rules, directory, path, body, template):
    raw = orjson.dumps(body)
    rules = TextRules(rules.tokenizer_path, rules.fingerprint, template)
    prompt = await reader.read(path, raw, {rules}, {4})
    request = parse_chat(raw) if path == CHAT else parse_completion(raw)
    tokenizer = Tokenizer.load(directory)
    expected = await tokenize_prompts(request, tokenizer, chat_template=template, vocab_size=400)
    assert prompt is not None and prompt.token_ids == expected
    assert prompt.num_tokens == sum(map(len, expected))
    # Sent on, they make a worker come to the same prompts without tokenizing.
    raw = orjson.dumps({**body, "prompt_token_ids": orjson.loads(prompt.to_json())})
    request = parse_chat(raw) if path == CHAT else parse_completion(raw)
    assert await tokenize_prompts(request, tokenizer, chat_template=template, vocab_size=400) == expected
    # One token is left to compute, so that a block which ends the prompt is none to reuse.
    assert prompt.keys[4] == [block_keys(ids[:-1], 4) for ids in expected]
    given = body.get("prompt", "")
    gives_ids = "prompt_token_ids" in body or (isinstance(given, list) and not isinstance(given[0], str))
    assert prompt.was_text is not gives_ids


async def test_the_salt_goes_into_the_keys(reader, rules):
    salted = {"prompt": list(range(9)), "cache_salt": "s"}
    prompt = await reader.read(COMPLETIONS, orjson.dumps(salted), {rules}, {4})
    assert prompt is not None and prompt.keys[4] == [block_keys(range(8), 4, "s")]


@pytest.mark.parametrize(
    "body", [{"prompt": ""}, {"promt": "x"}, {"prompt": [2**40] * 9}, {"prompt": "\ud800"}]
)
async def test_what_a_worker_refuses_is_left_to_it(reader, rules, body):
    raw = orjson.dumps(body) if body != {"prompt": "\ud800"} else b'{"prompt": "\\ud800"}'
    assert await reader.read(COMPLETIONS, raw, {rules}, {4}) is None


async def test_another_tokenizer_is_not_believed_and_said_once(reader, directory, caplog):
    wrong = TextRules(str(directory), "0123", None)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await reader.read(COMPLETIONS, b'{"prompt": "x"}', {wrong}, {4}) is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert "goes by load alone" in message and "another tokenizer" in message and "tokenizer_dir" in message


async def test_the_place_that_the_configuration_names_comes_first(rules, directory, caplog):
    reader = PromptReader(["/nowhere/at/all", str(directory)])
    there = TextRules("/of/another/machine", rules.fingerprint, None)
    assert await reader.read(COMPLETIONS, b'{"prompt": "x"}', {there}, {4}) is not None
    assert caplog.records == []
    await reader.close()


@pytest.mark.parametrize("others", [{None}, {TextRules("", "other", None)}])
async def test_workers_that_disagree_get_the_text(reader, rules, others, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert await reader.read(COMPLETIONS, b'{"prompt": "x"}', {rules, *others}, {4}) is None
    assert len(caplog.records) == 1


async def test_without_workers_nothing_is_said(reader, caplog):
    assert await reader.read(COMPLETIONS, b'{"prompt": "x"}', set(), set()) is None
    assert caplog.records == []
