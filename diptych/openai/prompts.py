"""A request's prompts as token ids. Worker and router share it, so that both come to the same ids."""

from diptych.openai.requests import ChatRequest, CompletionRequest
from diptych.text import Tokenizer


def prompt_texts(
    request: CompletionRequest | ChatRequest, tokenizer: Tokenizer, chat_template: str | None
) -> list[str] | list[list[int]]:
    """Each prompt as the request gives it: text, or token ids. `chat_template` is the server's own."""
    if isinstance(request, CompletionRequest):
        return request.prompts
    if request.token_prompts is not None:
        return request.token_prompts
    variables = request.template_variables
    if variables["chat_template"] is None:
        variables["chat_template"] = chat_template
    return [tokenizer.apply_chat_template(request.messages, **variables)]


def encode_prompt(
    prompt: str | list[int], request: CompletionRequest | ChatRequest, tokenizer: Tokenizer
) -> list[int]:
    """May take long for long texts."""
    if isinstance(prompt, list):
        return prompt
    return tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)


def truncated(token_ids: list[int], request: CompletionRequest | ChatRequest) -> list[int]:
    """What is left when the request wants only the prompt's end."""
    keep = request.truncate_prompt_tokens
    return token_ids if keep is None else token_ids[-keep:]
