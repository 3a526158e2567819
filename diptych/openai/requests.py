"""The bodies of /v1/completions and /v1/chat/completions: OpenAI's fields and those of TensorRT-LLM.

Only names and types; `parse.py` checks values. A field that is null counts as not given. Fields without
effect are here because clients send them.
"""

from typing import Any

import msgspec

from diptych.openai.disagg import DisaggregatedParams


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """As in TensorRT-LLM, an object without `include_usage` asks for usage."""

    include_usage: bool = True
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # OpenAI's padding of chunks: no effect


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: str


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints have."""

    model: str | None = None
    max_tokens: int | None = None  # None: until the context is full
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int = 1
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # no effect: byte-exact decoding adds no spaces
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool = False
    cache_salt: str = ""
    response_format: ResponseFormat | None = None
    prompt_token_ids: Any = None  # list[int] | list[list[int]], in place of the prompt or the messages
    disaggregated_params: DisaggregatedParams | None = None

    # No effect
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool = False
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    # Accepted with the value that means "off"
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | int = False
    top_p_min: float = 0.0
    prompt_ignore_length: int = 0
    lora_request: Any = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell; None: no log probabilities at all."""
        return None

    @property
    def prompt_logprobs(self) -> bool:
        """Whether log probabilities are told of the prompt's tokens, too."""
        return False

    @property
    def token_prompts(self) -> list[list[int]] | None:
        """`prompt_token_ids` as a list of prompts, whichever way it was written."""
        given: list[Any] | None = self.prompt_token_ids
        if given is None:
            return None
        return [given] if isinstance(given[0], int) else given


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: Any = None  # str | list[str] | list[int] | list[list[int]]
    add_special_tokens: bool = True
    logprobs: int | None = None
    echo: bool = False
    detokenize: bool = True
    suffix: str = ""
    return_context_logits: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each prompt: `prompt_token_ids` when given, else `prompt`, as text or token ids."""
        if self.token_prompts is not None:
            return self.token_prompts
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[Any] = self.prompt
        return [prompts] if isinstance(prompts[0], int) else prompts

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompt_logprobs(self) -> bool:
        return self.echo and self.logprobs is not None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`messages` are as the client sent them, but text parts are joined: what chat templates take."""

    messages: list[dict[str, Any]] = []
    add_special_tokens: bool = False
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    reasoning_effort: str | None = None
    documents: list[dict[str, Any]] | None = None

    # No effect
    parallel_tool_calls: bool = True
    verbosity: str | None = None

    # Accepted with the value that means "text only"
    modalities: tuple[str, ...] = ("text",)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_variables(self) -> dict[str, Any]:
        """The keyword arguments of Tokenizer.apply_chat_template."""
        variables = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        if self.documents is not None:
            variables["documents"] = self.documents
        return {
            **variables,
            "tools": self.tools if self.tools and self.tool_choice != "none" else None,
            "add_generation_prompt": self.add_generation_prompt,
            "chat_template": self.chat_template,
        }
