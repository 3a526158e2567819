"""A whole step of a Llama-like decoder on the CPU: prefill and decode rows mixed, on a paged KV pool.

The work is done by csrc/cpu_step.cpp, compiled on first use and called without the GIL. Weights and the
operands of every product are bf16; the residual stream, softmax and all sums are float32. The result of a row
is bit-identical whatever else is in the batch, however its prompt was cut into chunks, and for any number of
threads.

Pool: bf16 ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, block-major. The
elements of one (layer, K or V, head) tile are in "vnni" order, of the same size as row-major:

    K  ``[tokens_per_block / 16][head_dim / 2][16][2]``  token, dimension pair, token, dimension of the pair
    V  ``[head_dim / 16][tokens_per_block / 2][16][2]``  dimension, token pair, dimension, token of the pair

which are the operand tiles of AMX and of the AVX-512 BF16 dot product; kernels/cpu_tiles.py converts. Slots
past a sequence's last token may hold anything, NaN included.

Three forms of the kernels: "amx", "avx512_bf16" and "portable" (AVX2 or whatever the compiler makes of it).
The best one is taken; DIPTYCH_CPU_ISA names another. Their results differ in rounding, not in accuracy.
"""

import ctypes
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from diptych.kernels import cpu_library
from diptych.kernels.cpu_build import KernelUnavailable
from diptych.kernels.cpu_library import StepShape, isa, supports

__all__ = ["CpuStep", "KernelUnavailable", "StepShape", "isa", "supports"]

Int32Array = npt.NDArray[np.int32]


class CpuStep:
    """One model's packed weights and its threads. Not for use by two threads at a time."""

    def __init__(
        self,
        shape: StepShape,
        weights: Mapping[str, torch.Tensor],
        cos: torch.Tensor,
        sin: torch.Tensor,
        num_threads: int,
    ) -> None:
        if reason := supports(shape):
            raise ValueError(reason)
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
        half = shape.head_dim // 2
        if cos.ndim != 2 or cos.shape[1] != half or cos.shape != sin.shape:
            raise ValueError(
                f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must both be [positions, {half}]"
            )
        self.shape = shape
        self.max_positions = int(cos.shape[0])
        self._library, form = cpu_library.load()
        self._handle: int | None = self._library.diptych_create(
            ctypes.byref(cpu_library.c_shape(shape, self.max_positions)),
            ctypes.c_int(num_threads),
            ctypes.c_int(form),
        )
        if not self._handle:
            raise MemoryError("there is not enough memory for the packed weights")
        self._pool: torch.Tensor | None = None
        self._num_blocks = 0
        self._logits = torch.empty(0)
        self._embedding = self._set_weights(weights)
        self._set_vector("cos", shape.num_layers, cos)
        self._set_vector("sin", shape.num_layers, sin)

    def bind(self, pool: torch.Tensor) -> None:
        """Use this KV pool, bf16 or raw bytes; it is kept alive until `close` or the next `bind`."""
        block_bytes = 4 * self.shape.num_layers * self.shape.num_kv_heads * self.shape.tokens_per_block
        block_bytes *= self.shape.head_dim
        if pool.dtype not in (torch.bfloat16, torch.uint8) or not pool.is_contiguous() or pool.is_cuda:
            raise ValueError("the pool must be a contiguous bfloat16 or uint8 tensor in host memory")
        if pool.nbytes == 0 or pool.nbytes % block_bytes or pool.data_ptr() % 64:
            raise ValueError(
                f"the pool has {pool.nbytes} bytes at {pool.data_ptr():#x}; it must be whole blocks of"
                f" {block_bytes} bytes and begin at a multiple of 64"
            )
        self._pool = pool
        self._num_blocks = pool.nbytes // block_bytes
        self._library.diptych_bind(
            self._open_handle(), ctypes.c_void_p(pool.data_ptr()), ctypes.c_int64(pool.nbytes)
        )

    def forward(
        self,
        token_ids: Int32Array,
        positions: Int32Array,
        sequence_ids: Int32Array,
        block_tables: Int32Array,
        logits_rows: Int32Array,
    ) -> torch.Tensor:
        """Logits, float32 [R, vocab_size], of the rows named in `logits_rows`; writes K and V of all T rows.

        Row t is token `token_ids[t]` at `positions[t]` of `sequence_ids[t]`, a row of `block_tables`. Rows of
        one sequence are consecutive, with rising positions. The tensor is a buffer of this object: it holds
        until the next call.
        """
        handle = self._open_handle()
        if self._pool is None:
            raise ValueError("bind a KV pool before the first forward")
        rows = [_int32(name, array) for name, array in (("token_ids", token_ids), ("positions", positions))]
        rows.append(_int32("sequence_ids", sequence_ids))
        tables = _int32("block_tables", block_tables, ndim=2)
        wanted = _int32("logits_rows", logits_rows)
        self._check(rows[0], rows[1], rows[2], tables, wanted)
        if len(wanted) > len(self._logits):
            self._logits = torch.empty(len(wanted), self.shape.vocab_size)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*rows, tables, wanted)]
        batch = cpu_library.Batch(
            *pointers, len(rows[0]), tables.shape[1], len(wanted), ctypes.c_void_p(self._logits.data_ptr())
        )
        if self._library.diptych_forward(handle, ctypes.byref(batch)):
            raise MemoryError(f"there is not enough memory for a step of {len(rows[0])} rows")
        return self._logits[: len(wanted)]

    def close(self) -> None:
        """Free the weights and end the threads. May be called twice."""
        if self._handle:
            self._library.diptych_destroy(ctypes.c_void_p(self._handle))
        self._handle = None
        self._pool = None

    def _open_handle(self) -> ctypes.c_void_p:
        if not self._handle:
            raise ValueError("this CpuStep is closed")
        return ctypes.c_void_p(self._handle)

    def _check(
        self,
        token_ids: Int32Array,
        positions: Int32Array,
        sequence_ids: Int32Array,
        tables: Int32Array,
        logits_rows: Int32Array,
    ) -> None:
        count = len(token_ids)
        if count == 0 or len(positions) != count or len(sequence_ids) != count:
            raise ValueError(
                f"token_ids ({count}), positions ({len(positions)}) and sequence_ids ({len(sequence_ids)})"
                " must have one length, at least 1"
            )
        size = self.shape.tokens_per_block
        _check_range("token_ids", token_ids, self.shape.vocab_size)
        _check_range("positions", positions, min(self.max_positions, tables.shape[1] * size))
        _check_range("sequence_ids", sequence_ids, len(tables))
        _check_range("logits_rows", logits_rows, count)
        same = sequence_ids[1:] == sequence_ids[:-1]
        if np.any(positions[1:][same] <= positions[:-1][same]):
            raise ValueError("positions must rise within the rows of one sequence")
        starts = np.flatnonzero(np.concatenate(([True], ~same)))
        ends = np.append(starts[1:], count) - 1
        oldest = positions[starts] - (self.shape.sliding_window or self.max_positions) + 1
        columns = np.arange(tables.shape[1])
        used = (columns >= np.maximum(oldest, 0)[:, None] // size) & (
            columns <= positions[ends][:, None] // size
        )
        _check_range("block_tables", tables[sequence_ids[starts]][used], self._num_blocks)

    def _set_weights(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Packs every weight; returns the embedding table, the only one that is used as it was given."""
        s = self.shape
        heads, qkv = s.num_heads * s.head_dim, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
        for layer in range(s.num_layers):
            prefix = f"layers.{layer}."
            matrices = {
                "qkv": (qkv, s.hidden_size),
                "o": (s.hidden_size, heads),
                "gate_up": (2 * s.intermediate_size, s.hidden_size),
                "down": (s.hidden_size, s.intermediate_size),
            }
            for name, size in matrices.items():
                self._set_matrix(name, layer, _weight(weights, prefix + name, *size))
            vectors = {"input_norm": s.hidden_size, "post_norm": s.hidden_size}
            vectors |= {"qkv_bias": qkv} if s.qkv_bias else {}
            vectors |= {"q_norm": s.head_dim, "k_norm": s.head_dim} if s.qk_norm else {}
            for name, length in vectors.items():
                self._set_vector(name, layer, _weight(weights, prefix + name, length))
        self._set_vector("norm", s.num_layers, _weight(weights, "norm", s.hidden_size))
        self._set_matrix("lm_head", s.num_layers, _weight(weights, "lm_head", s.vocab_size, s.hidden_size))
        embedding = (
            _weight(weights, "embed_tokens", s.vocab_size, s.hidden_size).to(torch.bfloat16).contiguous()
        )
        self._library.diptych_set_embedding(self._open_handle(), ctypes.c_void_p(embedding.data_ptr()))
        return embedding

    def _set_matrix(self, name: str, layer: int, weight: torch.Tensor) -> None:
        weight = weight.to(torch.bfloat16).contiguous()
        pointer = ctypes.c_void_p(weight.data_ptr())
        self._library.diptych_set_matrix(self._open_handle(), layer, cpu_library.MATRICES[name], pointer)

    def _set_vector(self, name: str, layer: int, values: torch.Tensor) -> None:
        values = values.to(torch.float32).contiguous()
        pointer, count = ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel())
        self._library.diptych_set_vector(
            self._open_handle(), layer, cpu_library.VECTORS[name], pointer, count
        )


def _weight(weights: Mapping[str, torch.Tensor], name: str, *size: int) -> torch.Tensor:
    if name not in weights:
        raise ValueError(f"the weight {name!r} is missing; it must have shape {size}")
    if tuple(weights[name].shape) != size:
        raise ValueError(f"the weight {name!r} has shape {tuple(weights[name].shape)}; it must have {size}")
    return weights[name].detach()


def _int32(name: str, array: Int32Array, *, ndim: int = 1) -> Int32Array:
    if array.dtype != np.int32 or array.ndim != ndim:
        raise ValueError(
            f"{name} is {array.dtype} with {array.ndim} dimensions; it must be int32 with {ndim}"
        )
    return np.ascontiguousarray(array)


def _check_range(name: str, values: Int32Array, limit: int) -> None:
    if values.size and (int(values.min()) < 0 or int(values.max()) >= limit):
        raise ValueError(
            f"{name} has values from {values.min()} to {values.max()}; allowed are 0 to {limit - 1}"
        )
