"""A tokenizer whose tokens are single bytes: enough to see what the OpenAI face makes of tokens."""

from pathlib import Path

import orjson
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from diptych.text import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_bytes(orjson.dumps({"eos_token": "<end>"}))
    return Tokenizer.load(path)
