"""One model's tokenizer: text to ids and back, chat messages to text, and the ids that mean something.

Loads a Hugging Face directory or a GGUF file. Stateless after loading, so that one serves all requests.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diptych.errors import InvalidRequest, ModelLoadError
from diptych.text.chat_template import ChatTemplates
from diptych.text.directory import load_directory
from diptych.text.gguf_tokenizer import load_gguf
from diptych.text.source import TokenizerSource
from diptych.text.token_bytes import TokenBytes


class Tokenizer:
    def __init__(self, source: TokenizerSource) -> None:
        backend = source.backend
        backend.no_truncation()  # some tokenizer.json files carry the settings of their training run
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        named = {backend.token_to_id(text) for text in source.special_tokens.values()}
        special = {token_id for token_id, token in added.items() if token.special}
        special |= {token_id for token_id in named if token_id is not None}
        self._backend = backend
        self._templates = ChatTemplates(source.templates, source.special_tokens)
        self._all_bytes = TokenBytes(backend, hidden=frozenset())
        self._text_bytes = TokenBytes(backend, hidden=frozenset(special))
        self.special_ids = frozenset(special)
        self.bos_token_id = source.bos_token_id
        self.eos_token_ids = source.eos_token_ids
        self.generation_config: Mapping[str, Any] = source.generation_config
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def fingerprint(self) -> str:
        """The same for tokenizers that make the same ids of the same texts and messages."""
        digest = hashlib.blake2b(self._backend.to_str().encode(), digest_size=8)
        digest.update(repr(self._templates.identity).encode())
        return digest.hexdigest()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """From a GGUF file, from a directory with tokenizer files, or from a directory with one GGUF file."""
        if path.is_file():
            return cls(load_gguf(path))
        if not path.is_dir():
            raise ModelLoadError(f"{path} is neither a directory with a tokenizer nor a GGUF file.")
        ggufs = sorted(path.glob("*.gguf"))
        if not (path / "tokenizer.json").is_file() and len(ggufs) == 1:
            return cls(load_gguf(ggufs[0]))
        return cls(load_directory(path))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # The batch call is the one that has a variant without offsets, which is a third faster.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidRequest(
                "The text holds half of a surrogate pair; it must be valid Unicode."
            ) from error
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        table = self.bytes_of(skip_special_tokens=skip_special_tokens)
        text = b"".join([table[token_id] for token_id in token_ids]).decode("utf-8", "replace")
        return text[1:] if table.drops_first_space and text.startswith(" ") else text

    def bytes_of(self, *, skip_special_tokens: bool) -> TokenBytes:
        return self._text_bytes if skip_special_tokens else self._all_bytes

    def token_bytes(self, token_id: int) -> bytes:
        return self._all_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The token as text; U+FFFD where it holds only part of a character."""
        return self._all_bytes[token_id].decode("utf-8", "replace")

    @property
    def has_chat_template(self) -> bool:
        return self._templates.available

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation. Encode it without special tokens: the template writes them."""
        return self._templates.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            variables=variables,
        )
