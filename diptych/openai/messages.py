"""Checks the messages of a chat request and joins their text parts.

A message keeps every field that the client sent, because templates read what they like.
"""

from typing import Any

from diptych.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool")


def normalize_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise InvalidRequest(
            f"messages is a {type(messages).__name__}; it must be an array of messages.", param="messages"
        )
    if not messages:
        raise InvalidRequest("messages is empty; it must hold at least one message.", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{path} is a {type(message).__name__}; it must be an object.", param=path)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(
            f"{path}.role is {role!r:.64}; it must be one of {', '.join(ROLES)}.", param=f"{path}.role"
        )
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise InvalidRequest(f"{path}.tool_calls must be an array.", param=f"{path}.tool_calls")
    content = message.get("content")
    if content is None:
        if role != "assistant":
            raise InvalidRequest(f"{path}.content is missing; it must be text.", param=f"{path}.content")
        return {**message, "content": ""}
    return {**message, "content": _text(content, f"{path}.content")}


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(
            f"{path} is a {type(content).__name__}; it must be a string or an array of text parts.",
            param=path,
        )
    return "\n".join(_part(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InvalidRequest(f"{path} is a {type(part).__name__}; it must be a text part.", param=path)
    kind = part.get("type")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise InvalidRequest(f"{path}.type is {kind!r:.64}; only 'text' is supported.", param=f"{path}.type")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{path}.text must be a string.", param=f"{path}.text")
    return text
