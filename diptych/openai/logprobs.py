"""Log probabilities in OpenAI's two formats."""

from collections.abc import Iterable
from typing import Any

from diptych.text import TokenLogprob

_LOWEST = -9999.0  # what OpenAI prints for impossible tokens; JSON has no infinity


def completion_logprobs(entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Parallel lists. Tokens are keys here, so one that is part of a character is written as its bytes."""
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        token = _key(entry.token)
        logprob, top = None, None
        if entry.logprob is not None:
            logprob = _finite(entry.logprob)
            top = {_key(other): _finite(other_logprob) for other, other_logprob in entry.top}
            top.setdefault(token, logprob)
        lists["tokens"].append(token)
        lists["token_logprobs"].append(logprob)
        lists["top_logprobs"].append(top)
        lists["text_offset"].append(entry.text_offset)
    return lists


def chat_logprobs(entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    return {"content": [_chat_entry(entry) for entry in entries], "refusal": None}


def _chat_entry(entry: TokenLogprob) -> dict[str, Any]:
    top = [_chat_token(token, logprob) for token, logprob in entry.top]
    assert entry.logprob is not None, "only an echoed prompt has a token without"
    return {**_chat_token(entry.token, entry.logprob), "top_logprobs": top}


def _chat_token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(token)}


def _key(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
