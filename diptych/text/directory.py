"""Finds tokenizer, special tokens, chat templates and generation defaults in a Hugging Face directory.

A directory without tokenizer.json is converted by `transformers`, if that is installed; nothing else here
needs it.
"""

from pathlib import Path
from typing import Any

import orjson
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from diptych.errors import ModelLoadError
from diptych.text.source import TokenizerSource


def load_directory(path: Path) -> TokenizerSource:
    config = _read_json(path / "tokenizer_config.json")
    special = _special_tokens(_read_json(path / "special_tokens_map.json")) | _special_tokens(config)
    templates = _templates(path, config)
    if (path / "tokenizer.json").is_file():
        backend = _read_backend(path / "tokenizer.json")
        _add_missing_tokens(backend, config)
    else:
        fast = _convert(path)
        backend = fast.backend_tokenizer
        special = _special_tokens(dict(fast.special_tokens_map)) | special
        templates = _named_templates(fast.chat_template) | templates
    generation = _read_json(path / "generation_config.json")
    bos = special.get("bos_token")
    return TokenizerSource(
        backend=backend,
        special_tokens=special,
        templates=templates,
        bos_token_id=None if bos is None else backend.token_to_id(bos),
        eos_token_ids=_eos_token_ids(backend, special, generation or _read_json(path / "config.json")),
        generation_config=generation,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty when there is no such file, for every one of these files is optional."""
    if not path.is_file():
        return {}
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__}; it must hold a JSON object.")
    return value


def _read_backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"{path} is no tokenizer that this version can load: {error}.") from error


def _convert(path: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelLoadError(
            f"{path} has no tokenizer.json; add one, or install transformers so that it can be made."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # whatever the conversion of a foreign format raises
        raise ModelLoadError(
            f"{path} has no tokenizer.json and transformers cannot make one: {error}"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelLoadError(f"{path} has no tokenizer.json and its tokenizer has no fast form.")
    return tokenizer


def _content(token: Any) -> str | None:
    """A token is written as its text or as an object with the text in `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    return {key: text for key, value in named.items() if (text := _content(value)) is not None}


def _add_missing_tokens(backend: Backend, config: dict[str, Any]) -> None:
    """Some directories list tokens only in tokenizer_config.json; they count when their ids come next."""
    listed = config.get("added_tokens_decoder", {})
    for token_id in sorted(map(int, listed)):
        spec = listed[str(token_id)]
        text = _content(spec)
        if text and backend.token_to_id(text) is None and token_id == backend.get_vocab_size():
            backend.add_tokens([AddedToken(text, special=bool(spec.get("special")), normalized=False)])


def _named_templates(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    return {str(name): str(text) for name, text in value.items()} if isinstance(value, dict) else {}


def _templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Later ones win: tokenizer_config.json, chat_template.json, chat_template.jinja, its neighbours."""
    found = _named_templates(config.get("chat_template"))
    found |= _named_templates(_read_json(path / "chat_template.json").get("chat_template"))
    if (path / "chat_template.jinja").is_file():
        found["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    return found


def _eos_token_ids(backend: Backend, special: dict[str, str], config: dict[str, Any]) -> tuple[int, ...]:
    listed = config.get("eos_token_id")
    if listed is None:  # models with several parts keep their language model's settings here
        listed = (config.get("text_config") or {}).get("eos_token_id")
    ids = set(listed) if isinstance(listed, list) else {listed}
    if "eos_token" in special:
        ids.add(backend.token_to_id(special["eos_token"]))
    return tuple(sorted(token_id for token_id in ids if isinstance(token_id, int)))
