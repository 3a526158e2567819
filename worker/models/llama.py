"""The Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3) as a plain torch model for inference.

One decoder, assembled from the layers by what the ModelConfig says. The residual stream is float32 whatever
the weights' dtype: that costs little and is what keeps greedy tokens those of a float32 run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.worker.collectives import ALONE, Collectives
from diptych.worker.layers.attention import Attention
from diptych.worker.layers.embedding import Embedding, LmHead
from diptych.worker.layers.linear import Linear, QuantMethod, Split
from diptych.worker.layers.mlp import GatedMlp
from diptych.worker.layers.norm import RmsNorm
from diptych.worker.layers.rope import RotaryEmbedding
from diptych.worker.models.config import ModelConfig
from diptych.worker.parallel import ONE_RANK, ParallelDims
from diptych.worker.step import StepContext


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    input_norm: RmsNorm
    attention: Attention
    post_norm: RmsNorm
    mlp: GatedMlp

    def __call__(
        self, x: Tensor, residual: Tensor, angles: tuple[Tensor, Tensor], context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """`x` is the last block's output, not yet in the residual stream."""
        normed, residual = self.input_norm.add(x, residual)
        normed, residual = self.post_norm.add(self.attention(normed, angles, context), residual)
        return self.mlp(normed), residual


@dataclass(frozen=True, slots=True)
class LlamaModel:
    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    norm: RmsNorm
    lm_head: LmHead
    rotary: RotaryEmbedding

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        weights: dict[str, Tensor],
        *,
        device: torch.device,
        method: QuantMethod,
        max_positions: int,
        dims: ParallelDims = ONE_RANK,
        ranks: Collectives = ALONE,
    ) -> "LlamaModel":
        """Takes the weights out of the mapping one by one, so that never two copies of all of them exist.

        `config` and `weights` are this rank's.
        """
        builder = _Builder(config, weights, device, method, ranks)
        embedding = Embedding(builder.take("embed_tokens"))
        head = (
            embedding.weight[dims.head_rows(config)]
            if config.tie_word_embeddings
            else builder.take("lm_head")
        )
        join = ranks.join_columns if len(head) < config.vocab_size else None
        return cls(
            embedding=embedding,
            layers=tuple(builder.layer(index) for index in range(config.num_layers)),
            norm=builder.norm("norm"),
            lm_head=LmHead(Linear(method.pack(head, None), "outputs", join)),
            rotary=RotaryEmbedding.build(config.rope, config.head_dim, max_positions, device),
        )

    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """`[T]` token ids to `[R, vocab]` float32 logits of the rows that the context names."""
        x = self.embedding(token_ids)
        residual = torch.zeros_like(x, dtype=torch.float32)
        angles = self.rotary.rows(context.positions)
        for layer in self.layers:
            x, residual = layer(x, residual, angles, context)
        rows = context.logits_rows
        normed, _ = self.norm.add(x[rows], residual[rows])
        return self.lm_head(normed)


@dataclass(frozen=True, slots=True)
class _Builder:
    config: ModelConfig
    weights: dict[str, Tensor]
    device: torch.device
    method: QuantMethod
    ranks: Collectives

    def take(self, name: str) -> Tensor:
        return self.weights.pop(name).to(self.device)

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.take(name), self.config.rms_norm_eps)

    def linear(self, name: str, split: Split, *, bias: bool = False) -> Linear:
        packed = self.method.pack(self.take(name), self.take(f"{name}_bias") if bias else None)
        return Linear(packed, split, self.ranks.total if split == "inputs" else None)

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"layers.{index}"
        return DecoderLayer(
            input_norm=self.norm(f"{prefix}.input_norm"),
            attention=self.attention(index, prefix),
            post_norm=self.norm(f"{prefix}.post_norm"),
            mlp=GatedMlp(
                gate_up=self.linear(f"{prefix}.gate_up", "outputs"),
                down=self.linear(f"{prefix}.down", "inputs"),
            ),
        )

    def attention(self, index: int, prefix: str) -> Attention:
        config = self.config
        return Attention(
            layer=index,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            qkv=self.linear(f"{prefix}.qkv", "outputs", bias=config.qkv_bias),
            o=self.linear(f"{prefix}.o", "inputs", bias=config.o_bias),
            q_norm=self.norm(f"{prefix}.q_norm") if config.qk_norm else None,
            k_norm=self.norm(f"{prefix}.k_norm") if config.qk_norm else None,
        )
