"""The OpenAI face: a client's request as the router needs it, and the bodies of its two legs.

The client's body is checked to be a JSON object and otherwise passed on byte for byte; what the router adds
is spliced in before the closing brace. Prompts, texts and tickets are never decoded.
"""

import random
import re
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import orjson

from diptych.errors import InvalidRequest
from diptych.journal import ChoiceSoFar, StreamSoFar
from diptych.router.fields import Headers
from diptych.router.policies.affinity import session_of

_RESPONSE_ID_PREFIX = {"/v1/completions": "cmpl-", "/v1/chat/completions": "chatcmpl-"}
PATHS = tuple(_RESPONSE_ID_PREFIX)

_SEED_BITS = 62
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class _Body(msgspec.Struct):
    """The fields that the router reads; their types are for the worker to check."""

    model: Any = None
    stream: Any = None
    seed: Any = None


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a client."""

    request_id: str  # the client's, if it gave one: it need not be unique
    unique_id: str
    path: str
    body: bytes
    model: str | None
    stream: bool
    seed: int | None  # ours, when the client gives none: every worker must draw the same
    created: int
    arrived: float  # monotonic
    deadline: float  # monotonic
    traceparent: str | None
    session: str | None = None  # what the client says it belongs to
    prompt_token_ids: bytes = b""  # as JSON, when the router has tokenized the prompt

    def headers(self, now: float) -> bytes:
        """What a leg that starts now is told besides its body."""
        left_ms = max(1, int((self.deadline - now) * 1000))
        lines = f"X-Request-ID: {self.request_id}\r\nX-Diptych-Timeout-Ms: {left_ms}\r\n"
        if self.traceparent is not None:
            lines += f"traceparent: {self.traceparent}\r\n"
        return lines.encode()

    def context_body(self, *, followed: bool = False) -> bytes:
        """`followed`: the generation leg is under way, too."""
        params = self._params("context_only")
        if followed:
            params["schedule_style"] = "generation_first"
        return self._body(params, self.prompt_token_ids)

    def early_body(self, kv_endpoint: str) -> bytes:
        """For a generation worker that gets first token and KV from the context worker there."""
        params = self._params("generation_only")
        params |= {"schedule_style": "generation_first", "ctx_info_endpoint": kv_endpoint}
        return self._body(params, self.prompt_token_ids)

    def generation_body(self, prefill: "Prefill") -> bytes:
        params = self._params("generation_only")
        params["choices"] = [
            orjson.Fragment(bytes(choice.disaggregated_params)) for choice in prefill.choices
        ]
        return self._body(params, bytes(prefill.prompt_token_ids))

    def whole_body(self) -> bytes:
        """For a worker that does both legs."""
        return self._body(self._params("context_and_generation"), self.prompt_token_ids)

    def resumed_body(self, prefill: "Prefill | None", so_far: StreamSoFar) -> bytes:
        """For a worker that goes on with a stream. `prefill`: None when one worker did both legs so far."""
        handed = [] if prefill is None else [choice.params() for choice in prefill.choices]
        known = max(so_far.choices, default=-1) + 1
        handed += [{"request_type": "generation_only", "first_gen_tokens": []}] * (known - len(handed))
        for index, choice in so_far.choices.items():
            handed[index] = _gone_on(handed[index], choice)
        params = self._params("generation_only")
        params["choices"] = handed
        known_ids = self.prompt_token_ids if prefill is None else bytes(prefill.prompt_token_ids)
        return self._body(params, known_ids)

    def _body(self, params: dict[str, Any], prompt_token_ids: bytes) -> bytes:
        added = b'"disaggregated_params":' + orjson.dumps(params)
        if prompt_token_ids:
            added += b',"prompt_token_ids":' + prompt_token_ids
        return _splice(self.body, added)

    def _params(self, request_type: str) -> dict[str, Any]:
        params = {
            "request_type": request_type,
            "disagg_request_id": self.unique_id,
            "response_id": _RESPONSE_ID_PREFIX[self.path] + self.unique_id,
            "created": self.created,
        }
        if self.seed is not None:
            params["seed"] = self.seed
        return params


def parse_call(
    path: str,
    headers: Headers,
    body: bytes,
    *,
    request_id: str,
    unique_id: str,
    arrived: float,
    timeout_s: float,
) -> Call:
    try:
        fields = msgspec.json.decode(body, type=_Body)
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    traceparent = headers.get("traceparent")
    if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
        traceparent = None
    return Call(
        request_id=request_id,
        unique_id=unique_id,
        path=path,
        body=body,
        model=fields.model if isinstance(fields.model, str) else None,
        stream=fields.stream is True,
        seed=random.getrandbits(_SEED_BITS) if fields.seed is None else None,
        created=int(time.time()),
        arrived=arrived,
        deadline=arrived + timeout_s,
        traceparent=traceparent,
        session=session_of(headers),
    )


def request_id_of(headers: Headers) -> str | None:
    """The client's X-Request-ID, when it is one that can be printed."""
    given = headers.get("X-Request-ID")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else None


class PrefillChoice(msgspec.Struct):
    disaggregated_params: msgspec.Raw

    def params(self) -> dict[str, Any]:
        decoded: dict[str, Any] = orjson.loads(bytes(self.disaggregated_params))
        return decoded


class Prefill(msgspec.Struct):
    """A context leg's answer; what only the generation worker reads stays undecoded."""

    choices: list[PrefillChoice]
    prompt_token_ids: msgspec.Raw = msgspec.Raw()  # empty when it is missing
    stream_head: str = ""
    finished: bool = False

    def ticket_ids(self, indices: Iterable[int] | None = None) -> list[str]:
        """Of these choices, or of all."""
        given = range(len(self.choices)) if indices is None else indices
        choices = (self.choices[index] for index in given if index < len(self.choices))
        tickets = (msgspec.json.decode(choice.disaggregated_params, type=_Ticket) for choice in choices)
        return [ticket.ticket_id for ticket in tickets if ticket.ticket_id]


class _Ticket(msgspec.Struct):
    ticket_id: str | None = None


def parse_prefill(body: bytes) -> Prefill:
    """Raises msgspec.DecodeError when it is not a context leg's answer."""
    return msgspec.json.decode(body, type=Prefill)


def client_answer(context_answer: bytes) -> bytes:
    """A context leg's finished answer as the client gets it."""
    answer = orjson.loads(context_answer)
    for name in ("prompt_token_ids", "stream_head", "finished"):
        answer.pop(name, None)
    for choice in answer["choices"]:
        choice.pop("disaggregated_params", None)
    return orjson.dumps(answer)


def error_event(error_body: bytes) -> bytes:
    """The end of a stream that failed. `error_body` is an OpenAI error object on one line."""
    return b"data: %b\n\ndata: [DONE]\n\n" % error_body


def _gone_on(params: dict[str, Any], choice: ChoiceSoFar) -> dict[str, Any]:
    """A choice's parameters with what it has drawn since. Its ticket has served, once there are tokens."""
    if not choice.token_ids and choice.finish_reason is None:
        return params
    params = {**params, "first_gen_tokens": [*params["first_gen_tokens"], *choice.token_ids]}
    for served in ("encoded_opaque_state", "ticket_id", "first_gen_logprobs", "prompt_logprobs"):
        params.pop(served, None)
    if choice.cached_tokens is not None:
        params["cached_tokens"] = choice.cached_tokens
    if choice.finish_reason is not None:
        params["finish_reason"] = choice.finish_reason
        params["stop_reason"] = choice.stop_token_id
    return params


def _splice(body: bytes, member: bytes) -> bytes:
    """Add members at the end of a JSON object: they win over the client's own of the same name."""
    inside = body.rstrip()[:-1]
    comma = b"" if inside.rstrip().endswith(b"{") else b","
    return b"%b%b%b}" % (inside, comma, member)
