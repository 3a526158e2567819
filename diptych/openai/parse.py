"""From the bytes of a body to a checked request. Every error is an InvalidRequest that names the field."""

import difflib
import re
from typing import Any, TypeVar

import msgspec
import orjson

from diptych.errors import InvalidRequest
from diptych.openai.checks import check_chat, check_completion
from diptych.openai.messages import normalize_messages
from diptych.openai.requests import ChatRequest, CompletionRequest, GenerationRequest

_Request = TypeVar("_Request", bound=GenerationRequest)

_MISMATCH = re.compile(r"Expected `(?P<want>[^`]*)`, got `(?P<got>[^`]*)`(?: - at `(?P<path>.*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`(?: - at `(?P<path>.*)`)?")
_RENAMED = {"max_completion_tokens": "max_tokens"}
_HOMES = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}


def parse_completion(body: bytes) -> CompletionRequest:
    request = _convert(_fields(body, CompletionRequest), CompletionRequest)
    check_completion(request)
    return request


def parse_chat(body: bytes) -> ChatRequest:
    fields = _fields(body, ChatRequest)
    if "messages" in fields:
        fields["messages"] = normalize_messages(fields["messages"])
    request = _convert(fields, ChatRequest)
    check_chat(request)
    return request


def _fields(body: bytes, kind: type[GenerationRequest]) -> dict[str, Any]:
    """The body's fields under our names; a field that is null counts as not given."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body is a JSON {_name(value)}; it must be an object.", code="invalid_json")
    fields = {name: item for name, item in value.items() if item is not None}
    for alias, name in _RENAMED.items():
        if alias in fields:
            fields[name] = fields.pop(alias)
    known = kind.__struct_fields__
    for name in fields:
        if name not in known:
            raise _unknown(name, kind)
    return fields


def _unknown(name: str, kind: type[GenerationRequest]) -> InvalidRequest:
    name = name[:64]  # it goes into the answer, and the search for its likes takes time
    for path, other in _HOMES.items():
        if other is not kind and name in other.__struct_fields__:
            return InvalidRequest(f"{name} is a field of {path} only.", param=name, code="unknown_field")
    near = difflib.get_close_matches(name, (*kind.__struct_fields__, *_RENAMED), n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "."
    return InvalidRequest(f"{name} is not a known field{hint}", param=name, code="unknown_field")


def _convert(fields: dict[str, Any], kind: type[_Request]) -> _Request:
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _type_error(str(error), fields) from error


def _type_error(message: str, fields: dict[str, Any]) -> InvalidRequest:
    if match := _MISMATCH.search(message):
        path = _path(match["path"])
        shown = _shown(fields.get(path))
        return InvalidRequest(
            f"{path} is {_article(match['got'])}{shown}; it must be {match['want'].replace(' | null', '')}.",
            param=path,
            code="wrong_type",
        )
    if match := _MISSING.search(message):
        path = f"{_path(match['path'])}.{match['field']}".lstrip(".")
        return InvalidRequest(f"{path} is missing.", param=path, code="missing_field")
    param = _path(message.rpartition(" - at `")[2].rstrip("`")) if " - at `" in message else None
    return InvalidRequest(f"The request is not valid: {message}.", param=param, code="invalid_value")


def _path(path: str | None) -> str:
    """msgspec writes `$.stop[...]` or `key` in `$.logit_bias`; clients know `stop` and `logit_bias`."""
    return (path or "").rpartition("$.")[2].replace("[...]", "[]").strip("`$")


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _name(value: Any) -> str:
    names = {
        str: "string",
        list: "array",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), "object")


def _shown(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        text = orjson.dumps(value).decode()
        return f" ({text})" if len(text) <= 40 else f" ({text[:37]}...)"
    return ""
