"""`stream_interval` changes how a stream is cut, and nothing else: with one worker and with two."""

import orjson
import pytest
from mesh import mesh
from test_same_answers import CHAT, COMPLETION, HELLO, ask, ask_streaming, open_session

EVERY = 4


@pytest.fixture(scope="module")
def seldom(servers, tmp_path_factory):
    """A worker that streams every few tokens, and a router with it behind the context worker."""
    with mesh(tmp_path_factory.mktemp("seldom")) as started:
        worker = started.worker("seldom", stream_interval=EVERY)
        router = started.router("router", [servers["context"]], [worker])
        yield worker.wait_ready(), router.wait_ready()


async def chunks(server, body):
    """The number of tokens in each event of a stream."""
    request = {**body, "stream": True, "return_token_ids": True}
    async with open_session() as session, session.post(server.url + COMPLETION, json=request) as response:
        assert response.status == 200, await response.text()
        lines = [line async for line in response.content if line.startswith(b"data: {")]
    return [len(orjson.loads(line[6:])["choices"][0]["token_ids"]) for line in lines]


async def test_tokens_come_by_the_interval(seldom):
    worker, router = seldom
    body = {"prompt": "The sea", "max_tokens": 11, "temperature": 0, "ignore_eos": True}
    for server in (worker, router):
        first, *others = await chunks(server, body)
        assert first == 1 and first + sum(others) == 11
        sent = first
        for count in others[
            :-1
        ]:  # a busy process may see several steps at once: more than a chunk, never less
            assert sent // EVERY < (sent + count) // EVERY
            sent += count


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETION, {"prompt": "1, 2, 3, 4,", "stop": [" 7"], "temperature": 0, "max_tokens": 30}),
        (COMPLETION, {"prompt": ["One", "Two and"], "n": 2, "seed": 3, "max_tokens": 9, "logprobs": 1}),
        (COMPLETION, {"prompt": "😀😃😄😁😆", "temperature": 0, "max_tokens": 22}),
        (CHAT, {**HELLO, "temperature": 0, "max_tokens": 10}),
    ],
)
async def test_the_answer_is_the_same(seldom, servers, path, body):
    whole = await ask(servers["aggregated"], path, body)
    for server in seldom:
        choices, usage = await ask_streaming(server, path, body)
        assert usage == whole["usage"]
        for choice in whole["choices"]:
            streamed = choices[choice["index"]]
            assert streamed["text"] == (choice["message"]["content"] if path == CHAT else choice["text"])
            assert streamed["token_ids"] == choice["token_ids"]
            assert streamed["ends"] == [(choice["finish_reason"], choice["stop_reason"])]
