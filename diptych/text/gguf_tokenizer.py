"""Builds a tokenizer from the metadata of a GGUF file.

Two families: "gpt2" (byte-level BPE whose way of cutting words is named by `tokenizer.ggml.pre`) and "llama"
(SentencePiece BPE with byte fallback, given as pieces with scores). Building takes a fraction of a second, so
nothing is cached.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from diptych.errors import ModelLoadError
from diptych.text.gguf_metadata import read_gguf_metadata
from diptych.text.source import TokenizerSource

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# tokenizer.ggml.pre -> how text is cut into words
_PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), "qwen2"),
}
# Turn ends that older files do not name as end-of-turn token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
_NAMED = ("bos", "eos", "unknown", "padding")


def load_gguf(path: Path) -> TokenizerSource:
    metadata = read_gguf_metadata(path)
    tokens = metadata.get(_PREFIX + "tokens")
    family = metadata.get(_PREFIX + "model")
    if not tokens or family not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"{path}: tokenizer.ggml.model is {family!r} with {len(tokens or ())} tokens; "
            "a 'gpt2' or 'llama' tokenizer can be built."
        )
    try:
        backend = _byte_level(metadata, path) if family == "gpt2" else _sentencepiece(metadata)
        _mark_special(backend, metadata)
        _frame(backend, metadata)
    except (KeyError, IndexError, TypeError) as error:
        raise ModelLoadError(f"{path}: the tokenizer metadata is not complete ({error!r}).") from error
    return TokenizerSource(
        backend=backend,
        special_tokens=_special_tokens(metadata),
        templates=_templates(metadata),
        bos_token_id=metadata.get(_PREFIX + "bos_token_id"),
        eos_token_ids=_eos_token_ids(metadata),
    )


def _byte_level(metadata: dict[str, Any], path: Path) -> Backend:
    name = metadata.get(_PREFIX + "pre", "default")
    cut = _PRE_TOKENIZERS.get(name)
    if cut is None:
        raise ModelLoadError(
            f"{path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(sorted(_PRE_TOKENIZERS))}. "
            "Serve the model from a directory with tokenizer.json instead."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata[_PREFIX + "merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(metadata[_PREFIX + "tokens"])}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=cut == "llama3"))
    backend.pre_tokenizer = _pre_tokenizer(cut)
    backend.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _pre_tokenizer(cut: str) -> Any:
    if cut == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut == "digits":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    words = Regex(_LLAMA3 if cut == "llama3" else _QWEN2)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(metadata: dict[str, Any]) -> Backend:
    tokens: list[str] = metadata[_PREFIX + "tokens"]
    unknown = tokens[metadata.get(_PREFIX + "unknown_token_id", 0)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _merges(vocabulary, metadata[_PREFIX + "scores"])
    backend = Backend(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(_PREFIX + "add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    return backend


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair that makes the best-scored piece: all pairs, in that order."""
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, token_id in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[token_id], vocabulary[left], vocabulary[right], (left, right)))
    ranked.sort()
    return [pair for *_, pair in ranked]


def _mark_special(backend: Backend, metadata: dict[str, Any]) -> None:
    kinds = metadata.get(_PREFIX + "token_type", ())
    special, plain = [], []
    for token, kind in zip(metadata[_PREFIX + "tokens"], kinds, strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _frame(backend: Backend, metadata: dict[str, Any]) -> None:
    """The BOS and EOS that `encode(add_special_tokens=True)` puts around a text."""
    tokens = metadata[_PREFIX + "tokens"]
    cut = _PRE_TOKENIZERS.get(metadata.get(_PREFIX + "pre", ""))
    adds_bos = metadata[_PREFIX + "model"] == "llama" or cut == "llama3"
    bos, eos = (metadata.get(f"{_PREFIX}{name}_token_id") for name in ("bos", "eos"))
    before = [bos] if bos is not None and metadata.get(_PREFIX + "add_bos_token", adds_bos) else []
    after = [eos] if eos is not None and metadata.get(_PREFIX + "add_eos_token", False) else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*(tokens[i] for i in before), "$A", *(tokens[i] for i in after)],
            special_tokens=[(tokens[i], i) for i in {*before, *after}],
        )


def _special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    tokens = metadata[_PREFIX + "tokens"]
    short = {"unknown": "unk", "padding": "pad"}
    return {
        f"{short.get(name, name)}_token": tokens[token_id]
        for name in _NAMED
        if (token_id := metadata.get(f"{_PREFIX}{name}_token_id")) is not None and token_id < len(tokens)
    }


def _templates(metadata: dict[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    found = {"default": metadata[key]} if key in metadata else {}
    return found | {
        name: metadata[f"{key}.{name}"]
        for name in metadata.get("tokenizer.chat_templates", ())
        if f"{key}.{name}" in metadata
    }


def _eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    ids = {metadata.get(f"{_PREFIX}{name}_token_id") for name in ("eos", "eot", "eom")}
    if metadata.get(_PREFIX + "eot_token_id") is None:
        tokens, kinds = metadata[_PREFIX + "tokens"], metadata.get(_PREFIX + "token_type", ())
        controls = {
            token: i for i, (token, k) in enumerate(zip(tokens, kinds, strict=False)) if k == _CONTROL
        }
        ids |= {controls.get(token) for token in _TURN_ENDS}
    return tuple(sorted(token_id for token_id in ids if token_id is not None))
