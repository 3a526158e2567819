"""Prompts of a wanted length out of real English text, no two with the same beginning.

With a tokenizer the length is exact; without one it is estimated from words, and the server's usage tells.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Prompt = str | list[int]

_TOKENS_PER_WORD = 1.5  # of documentation, with its markup


class Tokenizer(Protocol):
    def encode(self, text: str) -> Sequence[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class FastTokenizer:
    """A Hugging Face tokenizer.json, without transformers."""

    inner: object

    @classmethod
    def load(cls, path: Path) -> "FastTokenizer":
        from tokenizers import Tokenizer as Loader

        return cls(Loader.from_file(str(path / "tokenizer.json" if path.is_dir() else path)))

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False).ids)  # type: ignore[attr-defined]

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=False))  # type: ignore[attr-defined]


def real_text() -> list[str]:
    """The words of Python's own documentation, which every Python brings along."""
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split()


class PromptSource:
    """A fresh prompt at each call; the same seed gives the same sequence of prompts."""

    def __init__(self, *, length: int, seed: int, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        if as_ids and tokenizer is None:
            raise ValueError("prompts as token ids need a tokenizer")
        self._length = length
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._random = random.Random(seed)
        self._words = real_text()

    def next(self) -> Prompt:
        # The number in front keeps prefix caches from answering for the engine.
        number = f"{self._random.randrange(10**9):09d}"
        if self._tokenizer is None:
            count = max(1, round(self._length / _TOKENS_PER_WORD) - 6)
            return f"{number} {self._slice(count)}"
        ids = list(self._tokenizer.encode(f"{number} {self._slice(self._length)}"))[: self._length]
        return ids if self._as_ids else self._tokenizer.decode(ids)

    def _slice(self, count: int) -> str:
        start = self._random.randrange(max(1, len(self._words) - count))
        return " ".join(self._words[start : start + count])
