from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from diptych.errors import Unavailable
from diptych.openai import DONE, ResponseHead, StreamWriter, Usage
from diptych.text import Delta, TokenLogprob

CHAT = ResponseHead("chat", "chatcmpl-1", 5, 'm"é')
COMPLETION = ResponseHead("completion", "cmpl-1", 5, "m")
USAGE = Usage(3, 2, cached_tokens=1)
LOGPROBS = (TokenLogprob(b"a", -0.5, ((b"a", -0.5),), 0),)


def data(event: bytes) -> dict:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    return orjson.loads(event[6:])


@contextmanager
def client_of(events: Iterable[bytes]) -> Iterator[openai.OpenAI]:
    """The real client, and behind a real socket a server that sends these events."""
    body = b"".join(events)

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            with openai.OpenAI(api_key="-", base_url=url, timeout=20, max_retries=0) as client:
                yield client
        finally:
            server.shutdown()


DELTAS = [
    Delta("hé"),
    Delta('\n"\\ \u2028\x00'),
    Delta("", (1,)),
    Delta("a", (1,), None, None, LOGPROBS),
    Delta("end", (), "stop", "###"),
]


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_openai_client_reads_a_chat(include_usage: bool):
    writer = StreamWriter(CHAT, include_usage=include_usage)
    events = [writer.role(0), *(writer.delta(0, delta) for delta in DELTAS), writer.usage(USAGE), DONE]
    for event in filter(None, events[:-1]):
        ChatCompletionChunk.model_validate(data(event))
    with client_of(events) as client:
        stream = client.chat.completions.create(model="m", messages=[], stream=True)
        chunks = list(stream)
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {("chatcmpl-1", 5, 'm"é')}
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "".join(delta.text for delta in DELTAS)
    with_choices = [chunk for chunk in chunks if chunk.choices]
    assert [chunk.choices[0].finish_reason for chunk in with_choices] == [None] * 4 + ["stop"]
    assert with_choices[-1].choices[0].model_extra == {"stop_reason": "###"}
    assert with_choices[3].choices[0].logprobs is not None
    if include_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 5
        assert all(chunk.usage is None for chunk in chunks[:-1])
    else:
        assert len(with_choices) == len(chunks)
        assert writer.usage(USAGE) == b""


def test_the_openai_client_reads_a_completion():
    writer = StreamWriter(COMPLETION, include_usage=True)
    assert writer.role(0) == b""
    events = [*(writer.delta(i % 2, delta) for i, delta in enumerate(DELTAS)), writer.usage(USAGE), DONE]
    with client_of(events) as client:
        chunks = list(client.completions.create(model="m", prompt="x", stream=True))
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["héend", '\n"\\ \u2028\x00a']
    last = data(events[-3])
    Completion.model_validate(last)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["usage"] is None


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 300))
def test_any_text_is_one_well_formed_event(text: str, index: int):
    for head, where in ((CHAT, "delta"), (COMPLETION, "text")):
        writer = StreamWriter(head)
        event = writer.delta(index, Delta(text))
        if not text:
            assert event == b""
            continue
        (choice,) = data(event)["choices"]
        assert choice["index"] == index
        assert choice[where] == ({"content": text} if where == "delta" else text)


def test_the_quick_way_and_the_full_way_agree():
    for head in (CHAT, COMPLETION):
        plain = data(StreamWriter(head).delta(1, Delta("x", (7,))))
        full = data(StreamWriter(head, with_token_ids=True).delta(1, Delta("x", (7,))))
        assert full["choices"][0].pop("token_ids") == [7]
        assert full == plain


def test_continuous_usage_is_on_every_chunk():
    writer = StreamWriter(CHAT, include_usage=True, continuous_usage=True)
    events = [
        writer.role(0, USAGE),
        *(writer.delta(0, delta, USAGE) for delta in DELTAS),
        writer.usage(USAGE),
    ]
    usages = [data(event)["usage"] for event in events if event]
    assert len(usages) == 6
    assert all(usage == USAGE.to_json() for usage in usages)


def test_without_include_usage_there_is_no_usage_field():
    assert "usage" not in data(StreamWriter(CHAT).delta(0, Delta("x")))


def test_token_ids_are_sent_even_without_text():
    event = StreamWriter(COMPLETION, with_token_ids=True).delta(0, Delta("", [1, 2]))
    assert data(event)["choices"][0]["token_ids"] == [1, 2]


@pytest.mark.parametrize(("reason", "word"), [("not_finished", "not_finished"), ("cancelled", None)])
def test_finish_words(reason: str, word: str | None):
    event = data(StreamWriter(CHAT).delta(0, Delta("", (), reason)))
    assert event["choices"][0]["finish_reason"] == word


def test_an_error_ends_the_stream_and_the_client_raises():
    writer = StreamWriter(CHAT)
    error = writer.error(Unavailable("The worker is gone."))
    assert error.endswith(DONE)
    with client_of([writer.role(0), writer.delta(0, Delta("a")), error]) as client:
        stream = client.chat.completions.create(model="m", messages=[], stream=True)
        with pytest.raises(openai.APIError, match="The worker is gone"):
            list(stream)
