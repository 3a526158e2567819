"""Writes a model without weights, for `--load_format dummy`: a config, and a tokenizer to which every id is text.

python benchmarks/gpu/dummy_model.py 8b DIR
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 258,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 258,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp8": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
}
_CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def write_model(path: Path, shape: str, quantization: str = "none") -> Path:
    """A vocabulary of bytes, then of words that nobody writes: random ids are drawn as text of a few letters each."""
    size = SHAPES[shape]["vocab_size"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"\u0120w{number}" for number in range(size - len(words) - 2)]
    words += ["<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": size - 2, "eos_token_id": size - 1}
    (path / "config.json").write_text(json.dumps(_COMMON | SHAPES[shape] | QUANTIZATIONS[quantization] | ids))
    tokenizer.save(str(path / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": _CHAT}
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    return path


if __name__ == "__main__":
    write_model(Path(sys.argv[2]), sys.argv[1])
