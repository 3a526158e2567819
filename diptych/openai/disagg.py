"""`disaggregated_params`: what makes a request a leg, with TensorRT-LLM's names (docs/protocol.md)."""

import base64
import binascii
from typing import Any

import msgspec

from diptych.errors import InvalidRequest
from diptych.wire import FinishReason, Logprob, RequestType

_MAX_KEY_CHARS = 128


class DisaggregatedParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of a request, or of one choice. Fields we do not know are ignored: the other leg may be newer.

    `finish_reason` and `stop_reason` of a choice are set when its last token is among `first_gen_tokens`,
    which are empty when none was drawn yet. `seed` is the router's, for a request that brings none: each
    choice derives its own.
    """

    request_type: RequestType
    disagg_request_id: str | int | None = None
    response_id: str | None = None
    created: int | None = None
    ctx_request_id: str | int | None = None
    first_gen_tokens: list[int] | None = None
    first_gen_logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob] | None = None  # of the prompt's tokens but the first, for echo
    encoded_opaque_state: str | None = None
    ticket_id: str | None = None
    cached_tokens: int | None = None
    seed: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    draft_tokens: list[int] | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | list[str] | None = None
    schedule_style: str | int | None = None
    conversation_id: str | None = None
    choices: list["DisaggregatedParams"] | None = None

    def handover_key(self, index: int) -> str:
        """What both legs call the prefill of one choice; empty when the generation leg does not follow it."""
        request_id = str(self.disagg_request_id or "")
        if self.schedule_style != "generation_first" or self.request_type == "context_and_generation":
            return ""
        return f"{request_id}/{index}" if 0 < len(request_id) <= _MAX_KEY_CHARS else ""

    def followed_owner(self) -> str:
        """Of a generation leg that was sent together with its context leg; empty for others."""
        follows = self.request_type == "generation_only" and self.handover_key(0)
        return self.ctx_info_endpoint if follows and isinstance(self.ctx_info_endpoint, str) else ""

    def of_choice(self, index: int) -> "DisaggregatedParams":
        """One choice's own; TensorRT-LLM's flat form is that of the only choice."""
        if self.choices is None:
            if index == 0:
                return self
        elif 0 <= index < len(self.choices):
            return self.choices[index]
        count = 1 if self.choices is None else len(self.choices)
        raise InvalidRequest(
            f"disaggregated_params describes {count} choices; the request has a choice {index}.",
            param="disaggregated_params.choices",
        )

    def ticket(self) -> bytes | None:
        if self.encoded_opaque_state is None:
            return None
        try:
            return base64.b64decode(self.encoded_opaque_state, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(
                f"disaggregated_params.encoded_opaque_state is not base64: {error}.",
                param="disaggregated_params.encoded_opaque_state",
            ) from error

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a response or another leg's request."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def encode_ticket(ticket: bytes) -> str:
    return base64.b64encode(ticket).decode("ascii")
