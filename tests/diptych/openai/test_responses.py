import orjson
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from diptych.openai import (
    ChoiceResult,
    ContextAnswer,
    DisaggregatedParams,
    Usage,
    encode_ticket,
    new_head,
    parse_completion,
    render_response,
)
from diptych.text import ChoiceText, Tokenizer, TokenLogprob
from diptych.wire import Logprob, TokenEvent

USAGE = Usage(3, 2, cached_tokens=1)
USAGE_JSON = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}
LOGPROBS = [
    TokenLogprob(b"a", -0.5, ((b"a", -0.5), (b"\xf0\x9f", -2.0)), 0),
    TokenLogprob(b"\xf0\x9f", float("-inf"), ((b"b", -0.1),), 1),
]


def result(**fields) -> ChoiceResult:
    return ChoiceResult(**{"index": 0, "text": "hé\n", "finish_reason": "stop"} | fields)


def test_a_completion():
    head = new_head("completion", "m", clock=lambda: 1234.9)
    body = render_response(head, [result(), result(index=1, finish_reason="length")], USAGE)
    parsed = Completion.model_validate_json(body)
    assert parsed.id.startswith("cmpl-")
    assert (parsed.object, parsed.created, parsed.model) == ("text_completion", 1234, "m")
    assert [(choice.index, choice.text, choice.finish_reason) for choice in parsed.choices] == [
        (0, "hé\n", "stop"),
        (1, "hé\n", "length"),
    ]
    assert orjson.loads(body)["usage"] == USAGE_JSON


def test_a_chat():
    head = new_head("chat", "m", response_id="chatcmpl-1", created=5)
    parsed = ChatCompletion.model_validate_json(render_response(head, [result(stop_reason="\n")], USAGE))
    assert (parsed.id, parsed.object, parsed.created) == ("chatcmpl-1", "chat.completion", 5)
    assert parsed.choices[0].message.role == "assistant"
    assert parsed.choices[0].message.content == "hé\n"
    assert parsed.choices[0].model_extra == {"stop_reason": "\n"}
    assert parsed.usage is not None
    assert parsed.usage.prompt_tokens_details is not None
    assert parsed.usage.prompt_tokens_details.cached_tokens == 1


def test_completion_logprobs():
    body = render_response(new_head("completion", "m"), [result(logprobs=LOGPROBS)], USAGE)
    logprobs = Completion.model_validate_json(body).choices[0].logprobs
    assert logprobs is not None
    part = "bytes:\\xf0\\x9f"
    assert logprobs.tokens == ["a", part]
    assert logprobs.token_logprobs == [-0.5, -9999.0]
    assert logprobs.text_offset == [0, 1]
    assert logprobs.top_logprobs == [{"a": -0.5, part: -2.0}, {"b": -0.1, part: -9999.0}]


def test_chat_logprobs():
    body = render_response(new_head("chat", "m"), [result(logprobs=LOGPROBS)], USAGE)
    logprobs = ChatCompletion.model_validate_json(body).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    first, second = logprobs.content
    assert (first.token, first.bytes, first.logprob) == ("a", [97], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("a", -0.5), ("\ufffd", -2.0)]
    assert (second.bytes, second.logprob) == ([0xF0, 0x9F], -9999.0)


@pytest.mark.parametrize(
    ("reason", "word"), [("not_finished", "not_finished"), ("cancelled", None), ("timeout", "timeout")]
)
def test_tensorrt_llms_finish_reasons(reason: str, word: str | None):
    body = orjson.loads(render_response(new_head("chat", "m"), [result(finish_reason=reason)], USAGE))
    assert body["choices"][0]["finish_reason"] == word


def test_from_tokens_to_the_answer(tokenizer: Tokenizer):
    ids = tokenizer.encode("hé", add_special_tokens=False)
    (eos,) = tokenizer.eos_token_ids
    choice = ChoiceText(tokenizer)
    choice.feed(TokenEvent(request_id="r", token_ids=ids, logprobs=[Logprob(i, -1.0) for i in ids]))
    choice.feed(
        TokenEvent(request_id="r", token_ids=[eos], logprobs=[Logprob(eos, -1.0)], finish_reason="stop")
    )
    done = ChoiceResult.of(0, choice, with_token_ids=True)
    body = orjson.loads(render_response(new_head("completion", "m"), [done], USAGE))
    assert body["choices"][0] == {
        "index": 0,
        "text": "hé",
        "logprobs": {
            "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9", "<end>"],
            "token_logprobs": [-1.0] * 4,
            "top_logprobs": [{"h": -1.0}, {"bytes:\\xc3": -1.0}, {"bytes:\\xa9": -1.0}, {"<end>": -1.0}],
            "text_offset": [0, 1, 1, 2],
        },
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": [*ids, eos],
    }


def test_a_context_answer_is_what_a_generation_leg_takes():
    params = DisaggregatedParams(
        request_type="context_only",
        disagg_request_id="d",
        ctx_request_id="c",
        first_gen_tokens=[42],
        first_gen_logprobs=[Logprob(42, -0.5, [(42, -0.5)])],
        encoded_opaque_state=encode_ticket(b"\x00ticket"),
        ticket_id="t",
        cached_tokens=0,
    )
    choice = result(finish_reason="not_finished", disaggregated_params=params)
    context = ContextAnswer(prompt_token_ids=[[1, 2, 3]], finished=False, stream_head=b"data: {}\n\n")
    head = new_head("completion", "m", response_id="cmpl-1", created=7)
    body = orjson.loads(render_response(head, [choice], USAGE, context=context))
    assert (body["prompt_token_ids"], body["stream_head"], body["finished"]) == (
        [[1, 2, 3]],
        "data: {}\n\n",
        False,
    )

    leg = {
        "prompt_token_ids": body["prompt_token_ids"],
        "disaggregated_params": {
            "request_type": "generation_only",
            "response_id": body["id"],
            "created": body["created"],
            "choices": [choice["disaggregated_params"] for choice in body["choices"]],
        },
    }
    request = parse_completion(orjson.dumps(leg))
    assert request.disaggregated_params is not None
    assert request.disaggregated_params.response_id == "cmpl-1"
    assert request.disaggregated_params.of_choice(0) == params
    assert request.disaggregated_params.of_choice(0).ticket() == b"\x00ticket"


def test_no_stream_head_without_stream():
    context = ContextAnswer(prompt_token_ids=[[1]], finished=True)
    body = orjson.loads(render_response(new_head("chat", "m"), [result()], USAGE, context=context))
    assert body["finished"] is True
    assert "stream_head" not in body
