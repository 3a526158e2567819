"""The Llama family on a GPU: the layers as a chain of few, fused kernels.

Knows nothing of batches or graphs: it computes rows whose tokens and blocks are on the device, and leaves
attention to what the step brings. The residual stream is float32, as in llama.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.kernels.activation_triton import silu_and_mul
from diptych.kernels.gated_linear_triton import gated_linear, pays
from diptych.kernels.gpu import num_multiprocessors
from diptych.kernels.norm_triton import add_rms_norm, embed_norm
from diptych.kernels.rope_triton import HeadInputs, HeadLayout
from diptych.kernels.skinny_linear_triton import (
    MAX_ROWS,
    choose,
    choose_gated,
    skinny_gated,
    skinny_linear,
    takes,
)
from diptych.worker.collectives import ALONE, Collectives
from diptych.worker.layers.fp8 import Fp8PartsLinear
from diptych.worker.layers.rope import RotaryEmbedding
from diptych.worker.models.config import ModelConfig
from diptych.worker.models.fp8_weights import scale_name
from diptych.worker.parallel import ONE_RANK, ParallelDims

ADDED_ROWS = 1024  # that are worth a product which reads and writes the residual stream

# `[S, T, (heads + 2 kv heads) * dim]` products, what makes heads of them, and one layer's cache, which takes the rows'
# K and V, to attended values `[T, heads, dim]`.
Attend = Callable[[Tensor, HeadInputs, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """T rows of a step; integers are int32."""

    token_ids: Tensor  # [T]
    attend: Attend
    logits_rows: Tensor | None = None  # [R] int64; None: all


@dataclass(frozen=True, slots=True)
class PartsLinear:
    """`x @ weight.T` as `[S, T, outputs]` partial sums, for a kernel that adds them up anyway."""

    weight: Tensor
    bias: Tensor | None
    num_sms: int

    def __call__(self, x: Tensor) -> Tensor:
        rows, inputs = x.shape
        if not self.is_skinny(rows):
            return F.linear(x, self.weight, self.bias)[None]
        return skinny_linear(x, self.weight, choose(rows, len(self.weight), inputs, self.num_sms))

    def gated(self, x: Tensor) -> Tensor:
        """`silu(gate) * up` of a gate and up weight, in x's dtype."""
        rows, inputs = x.shape
        if pays(rows, self.weight, self.num_sms):
            return gated_linear(x, self.weight, self.num_sms)
        plan = None
        if self.is_skinny(rows):
            plan = choose_gated(rows, len(self.weight) // 2, inputs, self.num_sms)
        return silu_and_mul(self(x), x.dtype) if plan is None else skinny_gated(x, self.weight, plan)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Adds `x @ weight.T` to `residual`, or gives back what is still to be added, `[S, T, outputs]`, S maybe 0."""
        if len(x) < ADDED_ROWS or self.bias is not None:
            return self(x)
        torch.addmm(residual, x, self.weight.T, out_dtype=torch.float32, out=residual)
        return residual.new_empty(0, *residual.shape)

    def is_skinny(self, rows: int) -> bool:
        """Whether cuBLAS would be slower."""
        return rows <= MAX_ROWS and self.bias is None and (rows == 1 or takes(self.weight))


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: PartsLinear | Fp8PartsLinear
    heads: HeadInputs
    o: PartsLinear | Fp8PartsLinear
    post_norm: Tensor
    gate_up: PartsLinear | Fp8PartsLinear
    down: PartsLinear | Fp8PartsLinear


class CudaNetwork:
    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        device: torch.device,
        max_positions: int,
        dims: ParallelDims = ONE_RANK,
        ranks: Collectives = ALONE,
    ) -> None:
        """Takes the weights out of the mapping one by one, so that never two copies of all of them exist.

        `config` and `weights` are this rank's.
        """
        sms = num_multiprocessors(device)
        heads = HeadLayout(config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps)
        rotary = RotaryEmbedding.build(config.rope, config.head_dim, max_positions, device)

        def take(name: str) -> Tensor:
            return weights.pop(name).to(device)

        def linear(name: str, bias: str | None = None) -> PartsLinear | Fp8PartsLinear:
            weight, shift = take(name), None if bias is None else take(bias)
            if scale_name(name) in weights:
                return Fp8PartsLinear(weight, take(scale_name(name)), shift, sms)
            return PartsLinear(weight, shift, sms)

        def layer(index: int) -> _Layer:
            prefix = f"layers.{index}"
            return _Layer(
                input_norm=take(f"{prefix}.input_norm"),
                qkv=linear(f"{prefix}.qkv"),
                heads=HeadInputs(
                    layout=heads,
                    bias=take(f"{prefix}.qkv_bias") if config.qkv_bias else None,
                    norms=(take(f"{prefix}.q_norm"), take(f"{prefix}.k_norm")) if config.qk_norm else None,
                    angles=(rotary.cos.contiguous(), rotary.sin.contiguous()),
                ),
                o=linear(f"{prefix}.o", f"{prefix}.o_bias" if config.o_bias else None),
                post_norm=take(f"{prefix}.post_norm"),
                gate_up=linear(f"{prefix}.gate_up"),
                down=linear(f"{prefix}.down"),
            )

        self.config = config
        self.device = device
        self.ranks = ranks
        self._embedding = take("embed_tokens")
        self._layers = tuple(layer(index) for index in range(config.num_layers))
        self._norm = take("norm")
        head = self._embedding[dims.head_rows(config)] if config.tie_word_embeddings else take("lm_head")
        self._head = PartsLinear(head, None, sms)

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def weight_bytes(self) -> int:
        """Read by one decode step."""
        layers = (
            tensor.nbytes
            for layer in self._layers
            for tensor in (layer.qkv.weight, layer.o.weight, layer.gate_up.weight, layer.down.weight)
        )
        return sum(layers) + self._head.weight.nbytes

    def largest_steps(self, most: int) -> list[int]:
        """Up to `most` rows, the largest number for each way to compute prompts, which differ in memory and kernels."""
        linear = self._layers[0].gate_up
        if isinstance(linear, Fp8PartsLinear):
            return [most]
        ways = {pays(rows, linear.weight, linear.num_sms): rows for rows in range(1, most + 1)}
        return sorted(ways.values())

    def forward(self, rows: Rows, pool: Tensor) -> Tensor:
        """Writes the rows' K and V into the pool; `[R, vocab]` float32 logits."""
        eps = self.config.rms_norm_eps
        count, width = len(rows.token_ids), self._embedding.shape[1]
        residual = torch.empty(count, width, dtype=torch.float32, device=self.device)
        normed = embed_norm(rows.token_ids, self._embedding, self._layers[0].input_norm, eps, residual)
        parts = normed[None]
        for index, layer in enumerate(self._layers):
            if index:
                normed = add_rms_norm(parts, residual, layer.input_norm, eps)
            attended = rows.attend(layer.qkv(normed), layer.heads, pool[:, index]).view(count, -1)
            if rows.logits_rows is not None and index == len(self._layers) - 1:
                # Nobody attends to what the last layer makes of the other rows.
                attended, residual = attended[rows.logits_rows], residual[rows.logits_rows]
                if len(residual) == 0:
                    return residual.new_empty(0, self.config.vocab_size)
            parts = self._add(layer.o, attended, residual)
            normed = add_rms_norm(parts, residual, layer.post_norm, eps)
            parts = self._add(layer.down, layer.gate_up.gated(normed), residual)
        return self._logits(add_rms_norm(parts, residual, self._norm, eps))

    def _add(self, linear: PartsLinear | Fp8PartsLinear, x: Tensor, residual: Tensor) -> Tensor:
        """The partial sums that the next norm adds to `residual`."""
        if self.ranks is ALONE and isinstance(linear, PartsLinear):
            return linear.add_to(residual, x)
        return self.ranks.total_parts(linear(x))

    def _logits(self, normed: Tensor) -> Tensor:
        if self._head.is_skinny(len(normed)):
            parts = self._head(normed)
            logits = parts[0] if len(parts) == 1 else parts.sum(0)
        else:
            logits = torch.mm(normed, self._head.weight.T, out_dtype=torch.float32)
        return logits if logits.shape[1] == self.config.vocab_size else self.ranks.join_columns(logits)
