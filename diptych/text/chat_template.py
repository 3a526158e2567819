"""Renders chat templates (jinja2) the way model authors expect, in a sandbox.

A template is foreign code: whatever it raises becomes an InvalidRequest. Its text may come with the model
or, where the server allows that, with the request.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from diptych.errors import InvalidRequest


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; when serving, its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter this does not escape HTML, which would change the prompt."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class ChatTemplates:
    """The templates that a model came with, compiled when first used."""

    def __init__(
        self,
        texts: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._texts = dict(texts)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, jinja2.Template] = {}
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
        )
        self._environment.filters["tojson"] = _tojson
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = lambda form: now().strftime(form)

    @property
    def identity(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """What decides how messages are rendered."""
        return tuple(sorted(self._texts.items())), tuple(sorted(self._special_tokens.items()))

    @property
    def available(self) -> bool:
        return bool(self._texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        chat_template: str | None,
        variables: Mapping[str, Any],
    ) -> str:
        text, template = self._template(chat_template, has_tools=bool(tools))
        values = {
            **self._special_tokens,
            "documents": None,
            **variables,
            "messages": _adapt(messages, text),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(values)
        except Exception as error:  # foreign code, run on input that its author did not foresee
            raise InvalidRequest(
                f"The chat template does not accept these messages: {error}", param="messages"
            ) from error

    def _template(self, given: str | None, *, has_tools: bool) -> tuple[str, jinja2.Template]:
        if given is not None and given not in self._texts:
            return given, self._compile(given, "The chat_template of the request")
        name = given or ("tool_use" if has_tools and "tool_use" in self._texts else "default")
        if name not in self._texts:
            if self._texts:
                message = f"The model has no default chat template; chat_template can be {self._names()}."
            else:
                message = "The model has no chat template: send chat_template, or use /v1/completions."
            raise InvalidRequest(message, param="chat_template")
        if name not in self._compiled:
            self._compiled[name] = self._compile(self._texts[name], "The model's chat template")
        return self._texts[name], self._compiled[name]

    def _names(self) -> str:
        return " or ".join(repr(name) for name in sorted(self._texts))

    def _compile(self, text: str, whose: str) -> jinja2.Template:
        try:
            return self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidRequest(f"{whose} is not valid: {error}", param="chat_template") from error


def _adapt(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Bring what clients send to what templates read.

    Tool-call arguments travel as JSON text, templates want the object. Role "developer" is the newer name of
    "system", and most templates know only the old one.
    """
    renames = "developer" not in template
    adapted = []
    for message in messages:
        copy = dict(message)
        if renames and copy.get("role") == "developer":
            copy["role"] = "system"
        if copy.get("tool_calls"):
            copy["tool_calls"] = [_with_object_arguments(call) for call in copy["tool_calls"]]
        adapted.append(copy)
    return adapted


def _with_object_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
