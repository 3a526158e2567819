from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from diptych.errors import InvalidRequest, ModelLoadError
from diptych.text import Tokenizer

# From transformers 5.23, with digits cut one by one as SmolLM's own tokenizer does.
GOLDEN = [
    ("The capital of France is", [504, 3575, 282, 4649, 314]),
    (
        "In 2024, 3.14 and 1000000",
        [788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 284, 216, 33, 32, 32, 32, 32, 32, 32],
    ),
    ("  two  spaces\n\n\ttab", [216, 827, 216, 5600, 1116, 197, 15999]),
    ("naïve café", [3546, 46494, 37366]),
    (
        "日本語テキスト",
        [23274, 115, 40993, 179, 120, 248, 11100, 224, 10391, 251, 10391, 134, 11100, 226],
    ),
    (
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 family",
        [10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 1564],
    ),
    ("def f(x):\n    return x[0]", [1604, 275, 24, 104, 727, 472, 1003, 1792, 75, 32, 77]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ("it's we'll I'D", [269, 506, 392, 3060, 339, 23, 52]),
]


@pytest.mark.model
@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_the_small_model_tokenizes_as_transformers_does(small: Tokenizer, text: str, ids: list[int]):
    assert small.encode(text, add_special_tokens=True) == ids
    assert small.decode(ids, skip_special_tokens=False) == text


@pytest.mark.model
def test_the_small_models_meaning_of_ids(small: Tokenizer):
    assert (small.bos_token_id, small.eos_token_ids, small.vocab_size) == (1, (2,), 49152)
    assert small.special_ids == frozenset(range(17))
    assert small.has_chat_template
    assert small.decode([1, 504, 2]) == "The"


def test_directory_special_tokens_and_ids(tiny: Tokenizer):
    start, end = tiny.encode("<|im_start|><|im_end|>", add_special_tokens=False)
    assert tiny.bos_token_id == start
    assert tiny.eos_token_ids == (end,)
    assert tiny.special_ids == {start, end}
    assert tiny.decode([start, end]) == ""
    assert tiny.decode([start, end], skip_special_tokens=False) == "<|im_start|><|im_end|>"


def test_added_tokens_are_text_as_written(tiny: Tokenizer):
    text = "a <tool é> b"
    assert tiny.decode(tiny.encode(text, add_special_tokens=False)) == text


def test_ids_outside_the_vocabulary_are_empty(tiny: Tokenizer):
    assert tiny.decode([tiny.vocab_size, 10**9, -1]) == ""
    assert tiny.token_bytes(tiny.vocab_size) == b""


def test_token_text_and_bytes_of_part_of_a_character(tiny: Tokenizer):
    ids = tiny.encode("\U0001f600", add_special_tokens=False)
    assert len(ids) > 1
    assert b"".join(map(tiny.token_bytes, ids)) == "\U0001f600".encode()
    assert "\N{REPLACEMENT CHARACTER}" in tiny.token_text(ids[0])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip(tiny: Tokenizer, text: str):
    ids = tiny.encode(text, add_special_tokens=False)
    assert tiny.decode(ids, skip_special_tokens=False) == text


@given(st.data())
def test_decode_is_the_librarys(tiny: Tokenizer, tiny_directory: Path, data: st.DataObject):
    backend = Backend.from_file(str(tiny_directory / "tokenizer.json"))
    no_added = st.integers(0, tiny.vocab_size - 2)
    ids = data.draw(st.lists(no_added, max_size=30))
    for skip in (True, False):
        assert tiny.decode(ids, skip_special_tokens=skip) == backend.decode(ids, skip_special_tokens=skip)


def test_half_of_a_surrogate_pair_is_refused(tiny: Tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        tiny.encode("\ud800", add_special_tokens=False)


def _copy(source: Path, target: Path, **files: object) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, value in files.items():
        (target / f"{name}.json").write_bytes(orjson.dumps(value))
    return target


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [0, 5]}}, (0, 1, 5)),
        ({"generation_config": {"eos_token_id": 7}}, (1, 7)),
        ({"config": {"eos_token_id": 6}}, (1, 6)),
        ({"config": {"text_config": {"eos_token_id": 6}}}, (1, 6)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 6}}, (1,)),
    ],
)
def test_eos_ids_of_all_files(
    tiny_directory: Path, tmp_path: Path, files: dict[str, object], expected: tuple
):
    tokenizer = Tokenizer.load(_copy(tiny_directory, tmp_path / "model", **files))
    assert tokenizer.eos_token_ids == expected


def test_generation_config_is_kept(tiny_directory: Path, tmp_path: Path):
    path = _copy(tiny_directory, tmp_path / "model", generation_config={"temperature": 0.6})
    assert Tokenizer.load(path).generation_config == {"temperature": 0.6}


def test_truncation_and_padding_of_the_file_are_ignored(tiny_directory: Path, tmp_path: Path):
    path = _copy(tiny_directory, tmp_path / "model")
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(path / "tokenizer.json"))
    text = "hello hello world " * 5
    tokenizer = Tokenizer.load(path)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokens_listed_only_in_the_config_are_added(tiny_directory: Path, tmp_path: Path):
    path = _copy(tiny_directory, tmp_path / "model")
    next_id = Tokenizer.load(path).vocab_size
    config = orjson.loads((path / "tokenizer_config.json").read_bytes())
    config["added_tokens_decoder"] = {str(next_id): {"content": "<|late|>", "special": True}}
    (path / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("<|late|>", add_special_tokens=False) == [next_id]
    assert next_id in tokenizer.special_ids


def test_add_special_tokens_uses_the_post_processor(tiny_directory: Path, tmp_path: Path):
    path = _copy(tiny_directory, tmp_path / "model")
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 0)]
    )
    backend.save(str(path / "tokenizer.json"))
    tokenizer = Tokenizer.load(path)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello", add_special_tokens=True) == [0, *plain]


def test_a_directory_without_tokenizer_json_is_converted(
    tiny: Tokenizer, tiny_directory: Path, tmp_path: Path
):
    pytest.importorskip("transformers")
    model = orjson.loads((tiny_directory / "tokenizer.json").read_bytes())["model"]
    (tmp_path / "vocab.json").write_bytes(orjson.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    (tmp_path / "config.json").write_bytes(orjson.dumps({"model_type": "gpt2"}))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|im_end|>")
    config = special | {"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    text = "hello hello world 日本語"
    assert tokenizer.encode(text, add_special_tokens=False) == tiny.encode(text, add_special_tokens=False)
    assert tokenizer.eos_token_ids == tiny.eos_token_ids
    assert tokenizer.apply_chat_template([]) == "<|im_end|>"


def test_an_empty_directory(tmp_path: Path):
    pytest.importorskip("transformers")
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_metaspace_decoder(tmp_path: Path):
    backend = Backend(models.WordLevel({"▁hello": 0, "▁world": 1, "!": 2, "<s>": 3}, unk_token="!"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([3, 0, 1, 2]) == backend.decode([3, 0, 1, 2]) == "hello world!"


@pytest.mark.parametrize(
    ("decoder", "word"),
    [(None, "no decoder"), (decoders.WordPiece(), "WordPiece"), (decoders.CTC(), "CTC")],
)
def test_unsupported_decoders_are_named(tmp_path: Path, decoder: object, word: str):
    backend = Backend(models.BPE())
    if decoder is not None:
        backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelLoadError, match=word):
        Tokenizer.load(tmp_path)


def test_paths_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(ModelLoadError, match="neither a directory"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(ModelLoadError, match="no GGUF file"):
        Tokenizer.load(tmp_path / "file")


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_broken_json_names_the_file(tiny_directory: Path, tmp_path: Path, content: bytes):
    path = _copy(tiny_directory, tmp_path / "model")
    (path / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        Tokenizer.load(path)
    (path / "generation_config.json").unlink()
    (path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.load(path)
