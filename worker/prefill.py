"""Attention of the chunks of a step that have several rows: flashinfer where it is installed, else our kernel."""

import logging
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diptych.kernels import flashinfer_attention
from diptych.kernels.flashinfer_attention import AttentionShape, FlashInferPrefill, PagedContext
from diptych.kernels.prefill_attention_triton import PrefillPlan, prefill_attention
from diptych.worker.device_state import Int32s
from diptych.worker.plan import Chunk

log = logging.getLogger(__name__)


class Prefill(Protocol):
    name: str

    def plan(self, chunks: list[Chunk], slots: Tensor, tables: Tensor) -> bool:
        """Before a step's layers: its chunks, and each row's slot of `tables`.

        Says whether `run` wants the rows' own K and V in place of the cache.
        """
        ...

    def run(self, query: Tensor, keys_values: Tensor, out: Tensor) -> None:
        """`[T, heads, dim]` queries of the planned rows into `out`.

        `keys_values`: the cache, which has the rows' K and V already, or only those, `[2, T, kv heads, dim]`.
        """
        ...


class TritonPrefill:
    name = "triton"

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._planned: tuple[PrefillPlan, Tensor, Tensor] | None = None

    def plan(self, chunks: list[Chunk], slots: Tensor, tables: Tensor) -> bool:
        firsts = np.array([chunk.start for chunk in chunks], np.int32)
        self._planned = PrefillPlan.of(query_starts(chunks), firsts, self._device), slots, tables
        return False

    def run(self, query: Tensor, keys_values: Tensor, out: Tensor) -> None:
        assert self._planned is not None, "plan comes before run"
        plan, slots, tables = self._planned
        shape = self._shape
        prefill_attention(
            query,
            keys_values,
            plan,
            slots=slots,
            tables=tables,
            scale=shape.scale,
            window=shape.window,
            out=out,
        )


class FlashInfer:
    name = "flashinfer"

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self._tokens_per_block = shape.tokens_per_block
        self._prefill = FlashInferPrefill(shape, flashinfer_attention.workspace(device))

    def plan(self, chunks: list[Chunk], slots: Tensor, tables: Tensor) -> bool:
        lengths = np.array([chunk.start + chunk.count for chunk in chunks], np.int32)
        blocks = [chunk.sequence.blocks for chunk in chunks]
        return self._prefill.plan(
            query_starts(chunks), PagedContext.of(blocks, lengths, self._tokens_per_block)
        )

    def run(self, query: Tensor, keys_values: Tensor, out: Tensor) -> None:
        self._prefill.run(query, keys_values, out)


def choose_prefill(shape: AttentionShape, device: torch.device) -> Prefill:
    usable = device.type == "cuda" and flashinfer_attention.supports(shape.head_dim, shape.dtype)
    if usable and flashinfer_attention.is_installed():
        return FlashInfer(shape, device)
    log.info("flashinfer is not used: prompts go through the Triton kernel, slower")
    return TritonPrefill(shape, device)


def query_starts(chunks: list[Chunk]) -> Int32s:
    counts = [chunk.count for chunk in chunks]
    return np.cumsum([0, *counts]).astype(np.int32)
