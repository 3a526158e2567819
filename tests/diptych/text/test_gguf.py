import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from diptych.errors import ModelLoadError
from diptych.text import Tokenizer
from diptych.text.gguf_metadata import read_gguf_metadata

WriteFile = Callable[..., Path]


def write_values(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 1 << 60)
    writer.add_int64("i64", -(1 << 60))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "日本 text")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 0.25])
    writer.add_array("strings", ["a", "é", "longer"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_every_type_of_value(tmp_path: Path):
    assert read_gguf_metadata(write_values(tmp_path / "values.gguf")) == {
        "general.architecture": "llama",
        "u8": 200,
        "i8": -3,
        "u16": 60000,
        "i16": -300,
        "u32": 4_000_000_000,
        "i32": -70000,
        "u64": 1 << 60,
        "i64": -(1 << 60),
        "f32": 0.5,
        "f64": 0.1,
        "bool": True,
        "string": "日本 text",
        "ints": [1, -2, 3],
        "floats": [0.5, 0.25],
        "strings": ["a", "é", "longer"],
    }


@pytest.mark.model
def test_the_small_models_header(small_gguf: Path):
    metadata = read_gguf_metadata(small_gguf)
    assert metadata["llama.vocab_size"] == len(metadata["tokenizer.ggml.tokens"]) == 49152
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert metadata["general.languages"] == ["en"]
    assert metadata["general.quantization_version"] == 2  # the last key


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path):
    whole = write_values(tmp_path / "values.gguf").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in range(1, end, 3):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            read_gguf_metadata(tmp_path / "cut.gguf")


def test_sizes_that_lie_are_an_error(tmp_path: Path):
    path = tmp_path / "lie.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    for value in (
        struct.pack("<IQ", 8, 1 << 62),  # string
        struct.pack("<IIQ", 9, 8, 1 << 62),  # strings
        struct.pack("<IIQ", 9, 4, 1 << 62),  # numbers
        struct.pack("<II", 77, 0),  # unknown type
    ):
        path.write_bytes(head + struct.pack("<Q", 1) + b"k" + value)
        with pytest.raises(ModelLoadError, match="damaged"):
            read_gguf_metadata(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ModelLoadError, match="version 1"):
        read_gguf_metadata(path)


def test_missing_file(tmp_path: Path):
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_gguf_metadata(tmp_path / "none.gguf")


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_round_trip(byte_level_file: WriteFile, pre: str):
    tokenizer = Tokenizer.load(byte_level_file(pre))
    text = "hello  world 123\n\n naïve 日本語 \U0001f469 <user>it's"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (1,))
    assert tokenizer.special_ids == {0, 1}


def test_gpt2_tokenizer_equals_the_directorys(byte_level_file: WriteFile, tiny: Tokenizer):
    tokenizer = Tokenizer.load(byte_level_file("gpt-2"))
    for text in ("hello hello world", "the cat's 12 naïve mats", "<|im_start|>x<|im_end|>"):
        assert tokenizer.encode(text, add_special_tokens=False) == tiny.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["a", "Ġ123456", "Ġb"]),
        ("smollm", ["a", "Ġ", "1", "2", "3", "4", "5", "6", "Ġb"]),
        ("llama-bpe", ["a", "Ġ", "123", "456", "Ġb"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4", "5", "6", "Ġb"]),
    ],
)
def test_words_are_cut_as_pre_says(pre: str, words: list[str]):
    from diptych.text.gguf_tokenizer import _PRE_TOKENIZERS, _pre_tokenizer

    cut = _pre_tokenizer(_PRE_TOKENIZERS[pre])
    assert [word for word, _ in cut.pre_tokenize_str("a 123456 b")] == words


@pytest.mark.parametrize(
    ("pre", "flags", "frame"),
    [
        ("gpt-2", {}, ([], [])),
        ("llama-bpe", {}, ([0], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, ([0], [1])),
    ],
)
def test_bos_and_eos_flags(byte_level_file: WriteFile, pre: str, flags: dict[str, bool], frame: tuple):
    tokenizer = Tokenizer.load(byte_level_file(pre, **flags))
    plain = tokenizer.encode("hello", add_special_tokens=False)
    before, after = frame
    assert tokenizer.encode("hello", add_special_tokens=True) == [*before, *plain, *after]


def test_template_and_special_tokens_reach_the_chat(byte_level_file: WriteFile):
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = Tokenizer.load(byte_level_file("gpt-2", template=template))
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>hi<|im_end|>"


def test_a_directory_with_one_gguf_file(byte_level_file: WriteFile):
    path = byte_level_file("gpt-2")
    assert Tokenizer.load(path.parent).vocab_size == Tokenizer.load(path).vocab_size


def test_unknown_pre_tokenizer_is_named(byte_level_file: WriteFile):
    with pytest.raises(ModelLoadError, match=r"'something'; known are .*smollm"):
        Tokenizer.load(byte_level_file("something"))


def test_other_families_and_missing_parts(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    writer.add_tokenizer_model("bert")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="'bert' with 1 tokens"):
        Tokenizer.load(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "half.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="not complete"):
        Tokenizer.load(tmp_path / "half.gguf")


def test_sentencepiece_merges_by_score(sentencepiece: Tokenizer):
    ids = sentencepiece.encode("hello world", add_special_tokens=True)
    assert [sentencepiece.token_text(i) for i in ids] == ["<s>", " hello", " world"]
    assert sentencepiece.decode(ids) == "hello world"
    assert sentencepiece.eos_token_ids == (2,)


def test_sentencepiece_falls_back_to_bytes(sentencepiece: Tokenizer):
    ids = sentencepiece.encode("é", add_special_tokens=False)
    assert [sentencepiece.token_bytes(i) for i in ids] == [b" ", b"\xc3", b"\xa9"]
    assert sentencepiece.decode(ids) == "é"


def test_sentencepiece_without_space_prefix(sentencepiece_file: WriteFile):
    tokenizer = Tokenizer.load(sentencepiece_file(add_space_prefix=False))
    ids = tokenizer.encode(" hello", add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in ids] == [" hello"]
    assert tokenizer.decode(ids) == " hello"
