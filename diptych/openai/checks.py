"""What the values of a request may be. Token ids are checked where the vocabulary is known."""

import math
from typing import Any

from diptych.errors import InvalidRequest
from diptych.openai.requests import ChatRequest, CompletionRequest, GenerationRequest

_MAX_STOPS = 16
_MAX_LOGPROBS = 20
_MAX_N = 128

# field -> lowest, highest, and how the range is said
_RANGES: dict[str, tuple[float, float, str]] = {
    "max_tokens": (1, math.inf, "at least 1"),
    "min_tokens": (0, math.inf, "at least 0"),
    "temperature": (0, 2, "between 0 and 2"),
    "top_p": (math.ulp(0.0), 1, "above 0 and at most 1"),
    "min_p": (0, 1, "between 0 and 1"),
    "top_k": (-1, math.inf, "at least 0, or -1 for off"),
    "n": (1, _MAX_N, f"between 1 and {_MAX_N}"),
    "presence_penalty": (-2, 2, "between -2 and 2"),
    "frequency_penalty": (-2, 2, "between -2 and 2"),
    "repetition_penalty": (math.ulp(0.0), math.inf, "above 0"),
    "truncate_prompt_tokens": (1, math.inf, "at least 1"),
    "num_logprobs": (0, _MAX_LOGPROBS, f"between 0 and {_MAX_LOGPROBS}"),
}
# field -> the values that ask for nothing; anything else asks for what we cannot do
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "top_p_min": (0,),
    "prompt_ignore_length": (0,),
    "lora_request": (None,),
    "suffix": ("",),
    "return_context_logits": (False,),
    "modalities": (("text",),),
    "tool_choice": (None, "none", "auto"),
}
_TEMPLATE_FIELDS = ("messages", "tools", "documents", "add_generation_prompt", "chat_template")


def check_completion(request: CompletionRequest) -> None:
    _check(request, logprobs_field="logprobs")
    if request.token_prompts is None:
        _check_prompt(request.prompt)
    if not request.detokenize and request.stops:
        raise _invalid("stop", "stop needs text; it cannot be used with detokenize false.")


def check_chat(request: ChatRequest) -> None:
    _check(request, logprobs_field="top_logprobs")
    if not request.messages and request.token_prompts is None:
        raise _invalid("messages", "messages is missing; it must hold at least one message.")
    if request.token_prompts is not None and len(request.token_prompts) > 1:
        raise _invalid("prompt_token_ids", "prompt_token_ids holds several prompts; a chat has one.")
    if request.top_logprobs is not None and not request.logprobs:
        raise _invalid("top_logprobs", "top_logprobs needs logprobs true.")
    for name in _TEMPLATE_FIELDS:
        if name in request.chat_template_kwargs:
            raise _invalid(
                "chat_template_kwargs", f"chat_template_kwargs.{name} has a field of its own: {name}."
            )


def _check(request: GenerationRequest, *, logprobs_field: str) -> None:
    for field, (low, high, said) in _RANGES.items():
        value = getattr(request, field)
        if value is not None and not low <= value <= high:
            name = logprobs_field if field == "num_logprobs" else field
            raise _invalid(name, f"{name} is {value}; it must be {said}.")
    for field, neutral in _NEUTRAL.items():
        value = getattr(request, field, neutral[0])
        if value not in neutral:
            raise _invalid(field, f"{field} is {value!r:.64}; that is not supported yet.")
    _check_counts(request)
    _check_ids(request)
    if request.stream_options is not None and not request.stream:
        raise _invalid("stream_options", "stream_options needs stream true.")
    if request.response_format is not None and request.response_format.type != "text":
        raise _invalid(
            "response_format",
            f"response_format.type is {request.response_format.type!r:.64}; only 'text' is supported yet.",
        )


def _check_counts(request: GenerationRequest) -> None:
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise _invalid(
            "min_tokens", f"min_tokens is {request.min_tokens}; max_tokens allows {request.max_tokens}."
        )
    if request.best_of is not None and request.best_of != request.n:
        raise _invalid(
            "best_of",
            f"best_of is {request.best_of} and n is {request.n}; only equal values are supported yet.",
        )
    stops = request.stops
    if len(stops) > _MAX_STOPS:
        raise _invalid("stop", f"stop holds {len(stops)} strings; at most {_MAX_STOPS} are allowed.")
    if "" in stops:
        raise _invalid("stop", "stop holds an empty string; every stop string needs a character.")


def _check_ids(request: GenerationRequest) -> None:
    if any(token_id < 0 for token_id in request.stop_token_ids):
        raise _invalid("stop_token_ids", "stop_token_ids holds a negative id; token ids are at least 0.")
    for token_id, bias in request.logit_bias.items():
        if not -100 <= bias <= 100:
            raise _invalid(
                "logit_bias", f"logit_bias of token {token_id} is {bias}; it must be between -100 and 100."
            )
    given = request.prompt_token_ids
    if given is not None and not (is_token_list(given) or _is_batch(given, is_token_list)):
        raise _invalid(
            "prompt_token_ids",
            "prompt_token_ids must be an array of token ids, or of such arrays, none empty.",
        )


def _check_prompt(prompt: Any) -> None:
    if prompt is None:
        raise _invalid("prompt", "prompt is missing; it must be text or token ids.")
    if isinstance(prompt, (str, list)) and not prompt:
        raise _invalid("prompt", "prompt is empty; it must hold at least one token.")
    if isinstance(prompt, str) or is_token_list(prompt):
        return
    if not (_is_batch(prompt, _is_text) or _is_batch(prompt, is_token_list)):
        raise _invalid(
            "prompt",
            f"prompt is {_describe(prompt)}; it must be a string, an array of strings, "
            "an array of token ids or an array of such arrays, none empty.",
        )


def is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int} and min(value) >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_batch(value: Any, is_item: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_item, value))


def _describe(value: Any) -> str:
    if not isinstance(value, list):
        return f"of type {type(value).__name__}"
    return "an array of " + " and ".join(sorted({type(item).__name__ for item in value}))


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=field)
