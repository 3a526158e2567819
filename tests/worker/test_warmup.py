"""Warming up starts the engine that serving would start, and needs no weights."""

import orjson
import pytest

from diptych.config import load_llm_config
from diptych.errors import StartupError
from diptych.worker.warmup import run

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def warm_up(path, **options):
    shown = []
    return run(load_llm_config(str(path), {"device": "cpu", **options}), shown.append), shown


def test_a_config_is_enough(tmp_path):
    (tmp_path / "config.json").write_bytes(orjson.dumps(CONFIG))
    ready, shown = warm_up(tmp_path, max_seq_len=64)
    assert ready.max_seq_len == 64 and ready.kernel
    assert shown[0] == "importing torch" and any("KV blocks" in line for line in shown)


def test_what_could_not_serve_says_why(tmp_path):
    (tmp_path / "config.json").write_bytes(orjson.dumps(CONFIG | {"architectures": ["Unheard"]}))
    with pytest.raises(StartupError, match="Unheard"):
        warm_up(tmp_path)
