import contextlib

import orjson
import pytest

from diptych.errors import InvalidRequest
from diptych.openai import ChatRequest, CompletionRequest, parse_chat, parse_completion

HI = [{"role": "user", "content": "hi"}]


def completion(**fields) -> CompletionRequest:
    return parse_completion(orjson.dumps({"model": "m", "prompt": "x"} | fields))


def chat(**fields) -> ChatRequest:
    return parse_chat(orjson.dumps({"model": "m", "messages": HI} | fields))


@pytest.mark.parametrize(
    "fields",
    [
        # what well-known clients and load generators send
        {"temperature": 0.0, "best_of": 1, "max_tokens": 16, "stream": True, "ignore_eos": True},
        {
            "repetition_penalty": 1.0,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "stop": None,
        },
        {"suffix": None, "logit_bias": None, "user": "u", "n": 2, "best_of": 2, "echo": False},
        {"top_k": -1, "min_p": 0, "min_tokens": 4, "max_tokens": None, "skip_special_tokens": False},
        {"use_beam_search": False, "length_penalty": 1, "early_stopping": False, "top_p_min": 0.0},
    ],
)
def test_common_completion_bodies(fields: dict[str, object]):
    assert completion(**fields).model == "m"


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"max_completion_tokens": 8, "temperature": 1, "top_p": 1, "n": 1, "stop": ["a", "b"], "seed": -5},
        {"logprobs": True, "top_logprobs": 5, "response_format": {"type": "text"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
        {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low", "documents": []},
        {"modalities": ["text"], "prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low"},
    ],
)
def test_common_chat_bodies(fields: dict[str, object]):
    assert chat(**fields).messages == HI


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_forms_of_a_prompt(prompt: object, prompts: list[object]):
    assert completion(prompt=prompt).prompts == prompts


def test_prompt_token_ids_stand_for_the_prompt():
    assert completion(prompt_token_ids=[1, 2]).prompts == [[1, 2]]
    assert parse_completion(b'{"prompt_token_ids": [[1], [2]]}').prompts == [[1], [2]]
    assert parse_chat(b'{"prompt_token_ids": [[7, 8]]}').token_prompts == [[7, 8]]


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [1, "a"], [[1], "a"], [True], [-1], [1.5], {}, 3, [None]]
)
def test_bad_prompts(prompt: object):
    with pytest.raises(InvalidRequest, match="prompt") as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 2.1}, "temperature", "2.1; it must be between 0 and 2"),
        ({"temperature": -0.1}, "temperature", "between 0 and 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.01}, "top_p", "at most 1"),
        ({"min_p": 1.5}, "min_p", "between 0 and 1"),
        ({"top_k": -2}, "top_k", "-1 for off"),
        ({"n": 0}, "n", "between 1 and 128"),
        ({"n": 129}, "n", "between 1 and 128"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": -1}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": 0}, "max_tokens", "at least 1"),
        ({"min_tokens": -1}, "min_tokens", "at least 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "max_tokens allows 4"),
        ({"presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"stop": ""}, "stop", "empty string"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ["a", 1]}, "stop[1]", "is an int; it must be str"),
        ({"stop": 5}, "stop", "is an int (5)"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "negative"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "must be int"),
        ({"max_tokens": "ten"}, "max_tokens", 'is a str ("ten"); it must be int'),
        ({"stream": "yes"}, "stream", 'is a str ("yes"); it must be bool'),
        ({"best_of": 3}, "best_of", "only equal values"),
        ({"stream_options": {}}, "stream_options", "needs stream true"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "must be bool",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "'json_object'; only 'text'"),
        ({"response_format": {}}, "response_format.type", "missing"),
        ({"use_beam_search": True}, "use_beam_search", "not supported yet"),
        ({"lora_request": {"name": "a"}}, "lora_request", "not supported yet"),
        ({"prompt_token_ids": []}, "prompt_token_ids", "none empty"),
        ({"prompt_token_ids": [1, [2]]}, "prompt_token_ids", "none empty"),
        ({"disaggregated_params": {}}, "disaggregated_params.request_type", "missing"),
        ({"disaggregated_params": {"request_type": "x"}}, "disaggregated_params.request_type", "'x'"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"max_completion_token": 1}, "max_completion_token", "did you mean max_completion_tokens?"),
        ({"zzzzzzzz": 1}, "zzzzzzzz", "not a known field."),
    ],
)
@pytest.mark.parametrize("make", [completion, chat])
def test_bad_values_name_the_field_and_what_is_allowed(
    make, fields: dict[str, object], param: str, words: str
):
    with pytest.raises(InvalidRequest) as caught:
        make(**fields)
    assert caught.value.param == param
    assert words in caught.value.message
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"return_context_logits": True}, "return_context_logits"),
        ({"detokenize": False, "stop": "a"}, "stop"),
        ({"messages": HI}, "messages"),
        ({"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_what_completions_refuse(fields: dict[str, object], param: str):
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [*HI, {"role": "robot", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"prompt_token_ids": [[1], [2]]}, "prompt_token_ids"),
        ({"prompt": "x"}, "prompt"),
        ({"functions": []}, "functions"),
    ],
)
def test_what_chats_refuse(fields: dict[str, object], param: str):
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


def test_missing_prompt_and_messages():
    with pytest.raises(InvalidRequest, match="prompt is missing"):
        parse_completion(b"{}")
    with pytest.raises(InvalidRequest, match="messages is missing"):
        parse_chat(b"{}")


def test_a_field_of_the_other_endpoint_says_where_it_belongs():
    with pytest.raises(InvalidRequest, match="field of /v1/chat/completions only"):
        completion(messages=HI)
    with pytest.raises(InvalidRequest, match="field of /v1/completions only"):
        chat(echo=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": ', "line 1 column 11"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "JSON array"),
    ],
)
def test_broken_json_tells_the_position(body: bytes, words: str):
    for parse in (parse_completion, parse_chat):
        with pytest.raises(InvalidRequest, match=words) as caught:
            parse(body)
        assert caught.value.code == "invalid_json"


def test_null_means_not_given():
    names = [name for name in CompletionRequest.__struct_fields__ if name != "prompt"]
    assert completion(**dict.fromkeys(names)) == parse_completion(b'{"prompt": "x"}')
    names = [name for name in ChatRequest.__struct_fields__ if name != "messages"]
    assert chat(**dict.fromkeys(names)) == parse_chat(orjson.dumps({"messages": HI}))


def test_text_parts_are_joined_and_other_fields_kept():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "n",
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    parsed = chat(messages=messages).messages
    assert parsed[0] == {"role": "user", "content": "a\nb", "name": "n"}
    assert parsed[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert parsed[2] == messages[2]


def test_template_variables():
    tools = [{"type": "function"}]
    request = chat(tools=tools, reasoning_effort="high", chat_template_kwargs={"x": 1}, documents=[{"t": 1}])
    assert request.template_variables == {
        "x": 1,
        "reasoning_effort": "high",
        "documents": [{"t": 1}],
        "tools": tools,
        "add_generation_prompt": True,
        "chat_template": None,
    }
    assert chat(tools=tools, tool_choice="none").template_variables["tools"] is None


def test_stream_options_follow_tensorrt_llm():
    assert completion(stream=True, stream_options={}).include_usage
    assert not completion(stream=True).include_usage
    request = completion(stream=True, stream_options={"include_usage": False})
    assert (request.include_usage, request.continuous_usage) == (False, False)


def test_disaggregated_params_of_choices():
    flat = completion(
        disaggregated_params={"request_type": "generation_only", "first_gen_tokens": [5], "new": 1}
    )
    assert flat.disaggregated_params is not None
    assert flat.disaggregated_params.of_choice(0).first_gen_tokens == [5]
    with pytest.raises(InvalidRequest, match="describes 1 choices; the request has a choice 1"):
        flat.disaggregated_params.of_choice(1)

    one = {
        "request_type": "context_only",
        "encoded_opaque_state": "AAE=",
        "first_gen_logprobs": [[5, -0.5, [[5, -0.5]]]],
    }
    both = completion(disaggregated_params={"request_type": "generation_only", "choices": [one, one]})
    assert both.disaggregated_params is not None
    choice = both.disaggregated_params.of_choice(1)
    assert choice.ticket() == b"\x00\x01"
    assert choice.first_gen_logprobs is not None
    assert choice.first_gen_logprobs[0].top == [(5, -0.5)]
    assert orjson.loads(orjson.dumps(choice.to_json())) == one


def test_a_broken_ticket_is_a_bad_request():
    request = completion(
        disaggregated_params={"request_type": "generation_only", "encoded_opaque_state": "%%"}
    )
    assert request.disaggregated_params is not None
    with pytest.raises(InvalidRequest, match="not base64"):
        request.disaggregated_params.ticket()


VALUES = [
    True,
    0,
    1,
    -1,
    3,
    0.5,
    -7.5,
    1e300,
    1 << 63,
    1 << 70,
    "",
    "a",
    [],
    [1],
    [-1],
    ["a"],
    [[]],
    [[1]],
    [None],
]
OBJECTS = [
    {},
    {"a": 1},
    {"1": 1},
    {"type": 3},
    {"request_type": []},
    {"choices": [{}]},
    [{}],
    [{"role": "user"}],
]


@pytest.mark.parametrize(
    ("parse", "kind"), [(parse_completion, CompletionRequest), (parse_chat, ChatRequest)]
)
def test_whatever_comes_it_is_a_request_or_an_invalid_request(parse, kind: type):
    base = {"prompt": "x"} if kind is CompletionRequest else {"messages": HI}
    accepted = 0
    for name in kind.__struct_fields__:
        for value in [*VALUES, *OBJECTS]:
            body = base | {name: value}
            try:
                raw = orjson.dumps(body)
            except TypeError:  # beyond 64 bits: as text, the way a client may well send it
                raw = str(body).replace("'", '"').encode()
            with contextlib.suppress(InvalidRequest):
                request = parse(raw)
                accepted += 1
                assert isinstance(request, kind)
    assert accepted > 100
