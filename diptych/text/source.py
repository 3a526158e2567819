"""What a loader found out about a tokenizer, whatever the files looked like; `Tokenizer` is built from it."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """`templates` maps a template's name ("default", "tool_use", ...) to its jinja text."""

    backend: Backend
    special_tokens: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>", for templates
    templates: dict[str, str] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation_config: dict[str, Any] = field(default_factory=dict)
