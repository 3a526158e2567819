"""Turns the tokens of one sequence into text as they come, never half a character.

The pieces, joined, are exactly what decoding all tokens at once gives. Knows nothing of stop strings.
"""

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.text.tokenizer import Tokenizer

_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """`feed` holds back the bytes of an unfinished character; `flush` gives them up as U+FFFD.

    SentencePiece writes a word's space in front of it and drops the first one of a text. `continues` says
    that the tokens go on from a prompt, so that their first space is a real one.
    """

    __slots__ = ("_bytes", "_decode", "_drop_space")

    def __init__(
        self, tokenizer: "Tokenizer", *, skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        self._bytes = tokenizer.bytes_of(skip_special_tokens=skip_special_tokens)
        self._decode = _decoder("replace").decode
        self._drop_space = self._bytes.drops_first_space and not continues

    def feed(self, token_ids: Iterable[int]) -> str:
        table = self._bytes
        return self._first(self._decode(b"".join([table[token_id] for token_id in token_ids])))

    def flush(self) -> str:
        return self._first(self._decode(b"", True))

    def _first(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text[1:] if text[0] == " " else text
        return text
