"""From a parsed request to token ids: templates, tokenization, and what the model's limits say about them."""

import asyncio

from diptych.errors import ContextLengthExceeded, InvalidRequest
from diptych.openai import ChatRequest, CompletionRequest, encode_prompt, prompt_texts, truncated
from diptych.text import Tokenizer

# Longer texts are tokenized on a thread: a megabyte takes a second, and other streams must not stand still.
_INLINE_CHARS = 4096


async def tokenize_prompts(
    request: CompletionRequest | ChatRequest,
    tokenizer: Tokenizer,
    *,
    chat_template: str | None,
    vocab_size: int,
) -> list[list[int]]:
    """The token ids of each prompt of the request, checked against the vocabulary."""
    prompts = prompt_texts(request, tokenizer, chat_template)
    token_prompts = [await _encode(prompt, request, tokenizer) for prompt in prompts]
    for token_ids in token_prompts:
        _check_ids(token_ids, vocab_size)
    return [truncated(token_ids, request) for token_ids in token_prompts]


def check_length(num_prompt: int, max_tokens: int | None, max_seq_len: int) -> None:
    """Room for the prompt, and for as much output as was asked for."""
    if num_prompt >= max_seq_len:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens; this model takes at most {max_seq_len - 1} and one token of "
            f"output (max_seq_len {max_seq_len})",
            param="prompt",
        )
    if max_tokens is not None and num_prompt + max_tokens > max_seq_len:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}; together they must not exceed "
            f"{max_seq_len}, so max_tokens can be at most {max_seq_len - num_prompt}",
            param="max_tokens",
        )


async def _encode(
    prompt: str | list[int], request: CompletionRequest | ChatRequest, tokenizer: Tokenizer
) -> list[int]:
    if len(prompt) <= _INLINE_CHARS or isinstance(prompt, list):
        return encode_prompt(prompt, request, tokenizer)
    return await asyncio.to_thread(encode_prompt, prompt, request, tokenizer)


def _check_ids(token_ids: list[int], vocab_size: int) -> None:
    if not token_ids:
        raise InvalidRequest("the prompt has no tokens; at least one is needed", param="prompt")
    if max(token_ids) >= vocab_size or min(token_ids) < 0:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"the prompt holds token id {wrong}; the model's tokens are 0 to {vocab_size - 1}", param="prompt"
        )
