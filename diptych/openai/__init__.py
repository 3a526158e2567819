"""The OpenAI face: requests parsed and checked, responses and streams rendered. Pure: no I/O, no engine."""

from diptych.openai.disagg import DisaggregatedParams, encode_ticket
from diptych.openai.parse import parse_chat, parse_completion
from diptych.openai.prompts import encode_prompt, prompt_texts, truncated
from diptych.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from diptych.openai.responses import (
    ChoiceResult,
    ContextAnswer,
    Kind,
    ResponseHead,
    Usage,
    new_head,
    new_response_id,
    render_response,
)
from diptych.openai.sampling import SamplingDefaults, to_choice_text, to_sampling_params
from diptych.openai.stream import DONE, StreamWriter

__all__ = [
    "DONE",
    "ChatRequest",
    "ChoiceResult",
    "CompletionRequest",
    "ContextAnswer",
    "DisaggregatedParams",
    "GenerationRequest",
    "Kind",
    "ResponseHead",
    "SamplingDefaults",
    "StreamWriter",
    "Usage",
    "encode_prompt",
    "encode_ticket",
    "new_head",
    "new_response_id",
    "parse_chat",
    "parse_completion",
    "prompt_texts",
    "render_response",
    "to_choice_text",
    "to_sampling_params",
    "truncated",
]
