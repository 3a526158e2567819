"""A request's prompts as tokens and blocks, for policies that look at prefixes; made on threads.

The tokenizer must be the workers' own: it is loaded from where the configuration or a worker says, and
believed only when its fingerprint is theirs. Without it requests are routed by load, which is said once.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import orjson

from diptych.block_hash import block_keys, num_reusable_blocks
from diptych.errors import DiptychError, InvalidRequest
from diptych.model_source import resolve_model
from diptych.openai import encode_prompt, parse_chat, parse_completion, prompt_texts, truncated
from diptych.router.probe import TextRules
from diptych.text import Tokenizer

_log = logging.getLogger(__name__)
_NUM_THREADS = 2  # the tokenizer's own work runs beside the event loop; what surrounds it does not
_CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompts of one request, as workers compute them."""

    token_ids: Sequence[Sequence[int]]
    keys: Mapping[int, Sequence[Sequence[int]]]  # by tokens per block: of each prompt's reusable blocks
    was_text: bool  # the request does not hold the ids itself

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    def to_json(self) -> bytes:
        """The ids, for workers that then need not tokenize again."""
        return orjson.dumps(self.token_ids)


class PromptReader:
    """`places`: directories, files or names to look for the tokenizer, before those that workers name."""

    def __init__(self, places: Iterable[str]) -> None:
        self._places = tuple(places)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenize")
        self._warned: set[str] = set()
        self._tokenizers: dict[str, asyncio.Task[Tokenizer | None]] = {}  # by fingerprint

    async def read(
        self, path: str, body: bytes, rules: Iterable[TextRules | None], block_sizes: Iterable[int]
    ) -> Prompt | None:
        """None when the workers disagree on the text's rules, or there is no tokenizer, or the request is
        not one that a worker would accept: it will say why."""
        found = set(rules)
        tokenizer = await self.tokenizer_of(found)
        if tokenizer is None:
            return None
        (rule,) = found
        template = None if rule is None else rule.chat_template
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, _read, path, body, tokenizer, template, frozenset(block_sizes)
        )

    async def tokenizer_of(self, rules: Set[TextRules | None]) -> Tokenizer | None:
        """The one that all of these workers use; looked for once."""
        if len(rules) > 1 or None in rules:
            self._warn("the workers do not all have the same tokenizer and chat template, or do not say so")
            return None
        for rule in rules:
            assert rule is not None
            task = self._tokenizers.get(rule.fingerprint)
            if task is None:
                task = asyncio.create_task(self._load(rule), name="load-tokenizer")
                self._tokenizers[rule.fingerprint] = task
            return await asyncio.shield(task)  # others wait for it, too
        return None

    async def close(self) -> None:
        for task in self._tokenizers.values():
            task.cancel()
        await asyncio.gather(*self._tokenizers.values(), return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _load(self, rules: TextRules) -> Tokenizer | None:
        reasons = []
        for place in dict.fromkeys((*self._places, rules.tokenizer_path)):
            if not place:
                continue
            loop = asyncio.get_running_loop()
            try:
                tokenizer, fingerprint = await loop.run_in_executor(self._threads, _load, place)
            except (DiptychError, OSError, ValueError) as error:
                reasons.append(str(error))
                continue
            if fingerprint == rules.fingerprint:
                return tokenizer
            reasons.append(f"{place} holds another tokenizer than the workers'")
        listed = "; ".join(reasons) or "neither the configuration nor a worker says where one is"
        self._warn(f"{listed}; set router.tokenizer_dir to a copy of the workers' tokenizer")
        return None

    def _warn(self, reason: str) -> None:
        """Once for each reason: what follows from it happens with every request."""
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning("kv_cache_aware routing has no tokenizer and goes by load alone: %s", reason)


def _load(place: str) -> tuple[Tokenizer, str]:
    path = Path(place).expanduser()
    tokenizer = Tokenizer.load(path if path.exists() else resolve_model(place, with_weights=False))
    return tokenizer, tokenizer.fingerprint


def _read(
    path: str, body: bytes, tokenizer: Tokenizer, chat_template: str | None, block_sizes: frozenset[int]
) -> Prompt | None:
    try:
        request = parse_chat(body) if path == _CHAT else parse_completion(body)
        texts = prompt_texts(request, tokenizer, chat_template)
        prompts = [truncated(encode_prompt(text, request, tokenizer), request) for text in texts]
        keys = {
            size: [
                block_keys(
                    token_ids[: num_reusable_blocks(len(token_ids), size) * size], size, request.cache_salt
                )
                for token_ids in prompts
            ]
            for size in block_sizes
        }
    except (InvalidRequest, OverflowError):  # OverflowError: ids that no vocabulary has
        return None
    return Prompt(prompts, keys, was_text=isinstance(texts[0], str))
