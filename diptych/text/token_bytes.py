"""The bytes that each token stands for, read off the tokenizer's decoder.

Decoding is defined once, here: the bytes of the tokens, joined, as UTF-8. That makes incremental and one-shot
decoding the same thing, and gives log probabilities the bytes of tokens that are only part of a character.
"""

import re
from collections.abc import Callable
from typing import Any

import orjson
from tokenizers import Tokenizer as Backend

from diptych.errors import ModelLoadError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, int]:
    """Code point -> byte, as GPT-2 wrote bytes: printable Latin-1 as itself, the others from 256 upwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


class TokenBytes(dict[int, bytes]):
    """Token id -> bytes, filled as ids are asked for. Unknown ids and those in `hidden` are empty."""

    def __init__(self, backend: Backend, *, hidden: frozenset[int]) -> None:
        super().__init__()
        steps = _steps(backend)
        self._text_of: Callable[[int], str | None] = backend.id_to_token
        self._added = frozenset(backend.get_added_tokens_decoder())
        self._hidden = hidden
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in steps else None
        self._replace = _replacements(steps)
        self._byte_tokens = "ByteFallback" in steps
        self.drops_first_space = _drops_first_space(steps)

    def __missing__(self, token_id: int) -> bytes:
        value = b"" if token_id in self._hidden else self._bytes(token_id)
        self[token_id] = value
        return value

    def _bytes(self, token_id: int) -> bytes:
        text = self._text_of(token_id) if token_id >= 0 else None
        if text is None:
            return b""
        if self._alphabet is not None:
            return self._from_alphabet(text) if token_id not in self._added else text.encode()
        if self._byte_tokens and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(match[1])
        for old, new in self._replace:
            text = text.replace(old, new)
        return text.encode()

    def _from_alphabet(self, text: str) -> bytes:
        assert self._alphabet is not None
        try:
            return bytes([self._alphabet[ord(char)] for char in text])
        except KeyError:  # a token that was added as it is written
            return text.encode()


def _steps(backend: Backend) -> dict[str, dict[str, Any]]:
    """The decoder's parts by type. Only decoders that work token by token have a place here."""
    if backend.decoder is None:
        raise ModelLoadError(
            "The tokenizer has no decoder; ByteLevel, Metaspace or a ByteFallback sequence is needed."
        )
    state = orjson.loads(backend.decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    steps = {part["type"]: part for part in parts}
    unknown = set(steps) - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    if unknown:
        raise ModelLoadError(
            f"The tokenizer's decoder uses {', '.join(sorted(unknown))}; "
            "ByteLevel, Metaspace and sequences of Replace, ByteFallback, Fuse and Strip are supported."
        )
    return steps


def _replacements(steps: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    found = []
    if "Metaspace" in steps:
        found.append((steps["Metaspace"]["replacement"], " "))
    if "Replace" in steps:
        pattern = steps["Replace"]["pattern"].get("String")
        if pattern is None:
            raise ModelLoadError(
                "The tokenizer's decoder replaces by a regular expression; only text is supported."
            )
        found.append((pattern, steps["Replace"]["content"]))
    return found


def _drops_first_space(steps: dict[str, dict[str, Any]]) -> bool:
    metaspace, strip = steps.get("Metaspace"), steps.get("Strip")
    if metaspace is not None and metaspace["prepend_scheme"] != "never":
        return True
    return strip is not None and strip["content"] == " " and strip["start"] > 0
