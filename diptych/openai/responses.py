"""Whole responses as bytes: completions and chats, of a server or of a context leg."""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import orjson

from diptych.openai.disagg import DisaggregatedParams
from diptych.openai.logprobs import chat_logprobs, completion_logprobs
from diptych.text import ChoiceEnd, ChoiceText, TokenLogprob

Kind = Literal["completion", "chat"]

_OBJECTS: dict[Kind, str] = {"completion": "text_completion", "chat": "chat.completion"}
_ID_PREFIXES: dict[Kind, str] = {"completion": "cmpl", "chat": "chatcmpl"}


class ResponseHead(msgspec.Struct, frozen=True):
    """What every part of one response repeats. Both legs of a request print the same."""

    kind: Kind
    id: str
    created: int
    model: str


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class ChoiceResult(msgspec.Struct, frozen=True, kw_only=True):
    """One finished choice. `token_ids` are printed when they are given."""

    index: int
    text: str
    finish_reason: ChoiceEnd | None
    stop_reason: str | int | None = None
    logprobs: Sequence[TokenLogprob] | None = None
    token_ids: Sequence[int] | None = None
    disaggregated_params: DisaggregatedParams | None = None

    @classmethod
    def of(
        cls,
        index: int,
        choice: ChoiceText,
        *,
        with_token_ids: bool = False,
        disaggregated_params: DisaggregatedParams | None = None,
    ) -> "ChoiceResult":
        return cls(
            index=index,
            text=choice.text,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            logprobs=choice.logprobs,
            token_ids=choice.token_ids if with_token_ids else None,
            disaggregated_params=disaggregated_params,
        )


class ContextAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a context leg adds for the router (docs/protocol.md)."""

    prompt_token_ids: list[list[int]]
    finished: bool
    stream_head: bytes | None = None


def new_response_id(kind: Kind) -> str:
    return f"{_ID_PREFIXES[kind]}-{secrets.token_hex(16)}"


def new_head(
    kind: Kind,
    model: str,
    *,
    response_id: str | None = None,
    created: int | None = None,
    clock: Callable[[], float] = time.time,
) -> ResponseHead:
    """`response_id` and `created` are the router's, when it has sent them."""
    return ResponseHead(
        kind, response_id or new_response_id(kind), int(clock()) if created is None else created, model
    )


def render_response(
    head: ResponseHead,
    choices: Sequence[ChoiceResult],
    usage: Usage,
    *,
    context: ContextAnswer | None = None,
) -> bytes:
    body: dict[str, Any] = {
        "id": head.id,
        "object": _OBJECTS[head.kind],
        "created": head.created,
        "model": head.model,
        "choices": [_choice(head.kind, choice) for choice in choices],
        "usage": usage.to_json(),
    }
    if context is not None:
        body["prompt_token_ids"] = context.prompt_token_ids
        if context.stream_head is not None:
            body["stream_head"] = context.stream_head.decode()
        body["finished"] = context.finished
    return orjson.dumps(body)


def finish_word(reason: ChoiceEnd | None) -> str | None:
    """As in TensorRT-LLM, a cancelled choice has no finish_reason."""
    return None if reason == "cancelled" else reason


def logprobs_json(kind: Kind, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if entries is None:
        return None
    return chat_logprobs(entries) if kind == "chat" else completion_logprobs(entries)


def _choice(kind: Kind, choice: ChoiceResult) -> dict[str, Any]:
    body: dict[str, Any] = {"index": choice.index}
    if kind == "chat":
        body["message"] = {"role": "assistant", "content": choice.text}
    else:
        body["text"] = choice.text
    body["logprobs"] = logprobs_json(kind, choice.logprobs)
    body["finish_reason"] = finish_word(choice.finish_reason)
    body["stop_reason"] = choice.stop_reason
    if choice.token_ids is not None:
        body["token_ids"] = choice.token_ids
    if choice.disaggregated_params is not None:
        body["disaggregated_params"] = choice.disaggregated_params.to_json()
    return body
