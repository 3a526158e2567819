"""Tiny random checkpoints of every family, and a way to run sequences through a Model in any chunking."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from diptych.worker.models.build import Model
from diptych.worker.models.config import ModelConfig
from diptych.worker.step import StepBatch

SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """`(family, dtype, shards=False, **config) -> (directory, transformers model in float32)`."""

    def make(family: str, dtype: torch.dtype, *, sharded: bool = False, **settings: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings})
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.uniform_(0.5, 1.5)
        path = tmp_path / "checkpoint"
        model.to(dtype).save_pretrained(path, max_shard_size="100KB" if sharded else "5GB")
        return path, model.float().eval()

    return make


@dataclass(frozen=True)
class Chunk:
    sequence: int
    start: int
    stop: int


class Runner:
    """Runs sequences on one Model over a pool whose unwritten slots hold NaN, with scrambled block ids."""

    def __init__(self, model: Model, config: ModelConfig, *, device: str = "cpu") -> None:
        self._model = model
        self._vocab_size = config.vocab_size
        shape = (64, config.num_layers, 2, config.num_kv_heads, 16, config.head_dim)
        self.pool = torch.full(shape, torch.nan, dtype=getattr(torch, model.kv_dtype), device=device)
        self._tables = np.random.default_rng(1).permutation(64).astype(np.int32).reshape(4, 16)
        model.bind(self.pool)

    def run(self, sequences: list[list[int]], steps: list[list[Chunk]]) -> list[Tensor]:
        """The logits of every row, for each sequence in the order of its positions."""
        logits = [torch.empty(len(tokens), self._vocab_size) for tokens in sequences]
        for chunks in steps:
            rows = self._model.forward(self.batch(sequences, chunks)).cpu().clone()
            for chunk, part in zip(chunks, rows.split([c.stop - c.start for c in chunks]), strict=True):
                logits[chunk.sequence][chunk.start : chunk.stop] = part
        return logits

    def batch(self, sequences: list[list[int]], chunks: list[Chunk]) -> StepBatch:
        tokens = [token for c in chunks for token in sequences[c.sequence][c.start : c.stop]]
        positions = [position for c in chunks for position in range(c.start, c.stop)]
        sequence_ids = [c.sequence for c in chunks for _ in range(c.start, c.stop)]
        return StepBatch(
            token_ids=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            sequence_ids=np.array(sequence_ids, np.int32),
            block_tables=self._tables,
            logits_rows=np.arange(len(tokens), dtype=np.int32),
        )


def whole(sequences: list[list[int]]) -> list[list[Chunk]]:
    """One sequence a step."""
    return [[Chunk(index, 0, len(tokens))] for index, tokens in enumerate(sequences)]


def mixed(sequences: list[list[int]]) -> list[list[Chunk]]:
    """All sequences in every step, in chunks of different sizes: prefill and decode together."""
    sizes = [1, 7, 16, 40]
    steps, at = [], [0] * len(sequences)
    while any(at[index] < len(tokens) for index, tokens in enumerate(sequences)):
        chunks = []
        for index, tokens in enumerate(sequences):
            stop = min(len(tokens), at[index] + sizes[(index + len(steps)) % len(sizes)])
            if stop > at[index]:
                chunks.append(Chunk(index, at[index], stop))
            at[index] = stop
        # Not in the order of their ids: a table row need not be the n-th sequence of a step.
        steps.append(chunks[::-1])
    return steps


@pytest.fixture
def runner() -> type[Runner]:
    return Runner


@pytest.fixture
def chunkings() -> dict[str, Callable[[list[list[int]]], list[list[Chunk]]]]:
    return {"whole": whole, "mixed": mixed}


@pytest.fixture
def sequences() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, SMALL["vocab_size"], length).tolist() for length in (100, 33, 5)]
