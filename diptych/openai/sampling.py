"""From a request to the engine's sampling parameters and to the text handling of its choices."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from diptych.errors import InvalidRequest
from diptych.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from diptych.text import ChoiceText, Tokenizer
from diptych.wire import SamplingParams

_SEED_BITS = (1 << 63) - 1


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request that says nothing gets."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingDefaults":
        """The model author's defaults in generation_config.json, of which `do_sample` does not count."""
        given = {name: config[name] for name in cls.__struct_fields__ if config.get(name) is not None}
        return msgspec.convert(given, cls)


def to_sampling_params(
    request: GenerationRequest,
    *,
    vocab_size: int,
    default_max_tokens: int,
    choice_index: int,
    defaults: SamplingDefaults,
) -> SamplingParams:
    """`choice_index` counts the choices of one prompt: equal prompts of one request draw equal tokens."""
    _check_vocabulary(request, vocab_size)

    def value(name: str) -> Any:
        given = getattr(request, name)
        return getattr(defaults, name) if given is None else given

    return SamplingParams(
        max_tokens=default_max_tokens if request.max_tokens is None else request.max_tokens,
        min_tokens=request.min_tokens,
        temperature=value("temperature"),
        top_k=max(0, value("top_k")),
        top_p=value("top_p"),
        min_p=value("min_p"),
        repetition_penalty=value("repetition_penalty"),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=_seed(request.seed, choice_index),
        logit_bias=request.logit_bias,
        num_logprobs=request.num_logprobs,
        prompt_logprobs=request.prompt_logprobs,
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
    )


def to_choice_text(
    request: CompletionRequest | ChatRequest, tokenizer: Tokenizer, *, echo: Sequence[int] = ()
) -> ChoiceText:
    """`echo`: the prompt, when the request asks to have it in front."""
    is_completion = isinstance(request, CompletionRequest)
    return ChoiceText(
        tokenizer,
        stops=request.stops,
        include_stop=request.include_stop_str_in_output,
        stop_token_ids=request.stop_token_ids,
        min_tokens=request.min_tokens,
        skip_special_tokens=request.skip_special_tokens,
        detokenize=request.detokenize if isinstance(request, CompletionRequest) else True,
        continues=is_completion,
        echo=echo,
    )


def _seed(seed: int | None, choice_index: int) -> int:
    if seed is None:
        return secrets.randbits(63)
    if choice_index == 0:
        return seed & _SEED_BITS
    digest = hashlib.blake2b(f"{seed}/{choice_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _SEED_BITS


def _check_vocabulary(request: GenerationRequest, vocab_size: int) -> None:
    for field, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"{field} names token {token_id}; the model's tokens are 0 to {vocab_size - 1}.",
                    param=field,
                )
