import contextlib
from datetime import datetime
from pathlib import Path

import orjson
import pytest

from diptych.errors import InvalidRequest
from diptych.text import Tokenizer
from diptych.text.chat_template import ChatTemplates

USER = [{"role": "user", "content": "hi"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(text: str, messages=USER, *, tools=None, chat_template=None, texts=None, **variables) -> str:
    templates = ChatTemplates(texts or {"default": text}, SPECIAL, now=lambda: datetime(2026, 11, 22))
    return templates.render(
        messages, tools=tools, add_generation_prompt=True, chat_template=chat_template, variables=variables
    )


FANCY = """{{- bos_token }}
{%- if tools %}
{{ tools | tojson(indent=2) }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}[{{ message.role }}] {{ message.content | trim }} {{ {'a': '<b>é'} | tojson }}
{% endif %}
{%- if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}{{ '!' * 2 }}{{ enable_thinking }}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_the_same_text_as_transformers(tiny_directory: Path, tiny: Tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_directory / "tokenizer.json"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    messages = [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": "a <b> & 'c'\n"},
        {"role": "skip", "content": "x"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "cut off"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": "é<"}}}]
    for given in (None, tools):
        expected = theirs.apply_chat_template(
            messages,
            tools=given,
            chat_template=FANCY,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=1,
        )
        ours = tiny.apply_chat_template(messages, tools=given, chat_template=FANCY, enable_thinking=1)
        assert ours == expected


def test_the_models_template(tiny: Tokenizer):
    expected = "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    assert tiny.apply_chat_template(USER) == expected
    assert tiny.apply_chat_template(USER, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>"


def test_date_comes_from_the_clock():
    assert render("{{ strftime_now('%d %b %Y') }}") == "22 Nov 2026"


def test_what_the_template_refuses_is_told():
    with pytest.raises(InvalidRequest, match="only user") as caught:
        render("{{ raise_exception('only user') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "text",
    ["{{ messages[0].nothing.more }}", "{{ 1 // 0 }}", "{{ 'a' + 1 }}", "{{ messages[0]['content'](3) }}"],
)
def test_any_failure_is_the_requests(text: str):
    with pytest.raises(InvalidRequest, match="does not accept"):
        render(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
    ],
)
def test_the_sandbox_holds(text: str):
    with contextlib.suppress(InvalidRequest):
        assert render(text) == ""


def test_syntax_errors_say_whose():
    with pytest.raises(InvalidRequest, match="chat_template of the request is not valid"):
        render("", chat_template="{% if %}")
    with pytest.raises(InvalidRequest, match="model's chat template is not valid"):
        render("{% if %}")


def test_tool_use_template_is_taken_when_there_are_tools():
    texts = {"default": "plain", "tool_use": "tools"}
    assert render("", texts=texts) == "plain"
    assert render("", texts=texts, tools=[{"type": "function"}]) == "tools"
    assert render("", texts=texts, chat_template="tool_use") == "tools"
    with pytest.raises(InvalidRequest, match="can be 'rag'"):
        render("", texts={"rag": "x"})


def test_a_model_without_template_says_so():
    with pytest.raises(InvalidRequest, match="no chat template: send chat_template"):
        ChatTemplates({}, {}).render(
            USER, tools=None, add_generation_prompt=True, chat_template=None, variables={}
        )


def test_developer_becomes_system_where_the_template_does_not_know_it():
    messages = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", messages) == "system"
    assert render("{# developer #}{{ messages[0].role }}", messages) == "developer"


def test_tool_call_arguments_become_objects():
    def call(arguments: object) -> list[dict[str, object]]:
        function = {"name": "f", "arguments": arguments}
        return [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        ]

    text = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(text, call('{"a": 1}')) == '{"a": 1}'
    assert render(text, call({"a": 1})) == '{"a": 1}'
    assert render(text, call("not json")) == '"not json"'


@pytest.mark.parametrize("where", ["config", "list", "json", "jinja", "folder"])
def test_every_place_of_a_template(tiny_directory: Path, tmp_path: Path, where: str):
    (tmp_path / "tokenizer.json").write_bytes((tiny_directory / "tokenizer.json").read_bytes())
    config = {"chat_template": "config"}
    expected = "config"
    if where == "list":
        config = {"chat_template": [{"name": "default", "template": "listed"}]}
        expected = "listed"
    elif where == "json":
        (tmp_path / "chat_template.json").write_bytes(orjson.dumps({"chat_template": "json"}))
        expected = "json"
    elif where == "jinja":
        (tmp_path / "chat_template.jinja").write_text("jinja")
        expected = "jinja"
    elif where == "folder":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("folder")
        expected = "folder"
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    tools = [{"type": "function"}] if where == "folder" else None
    assert Tokenizer.load(tmp_path).apply_chat_template(USER, tools=tools) == expected
