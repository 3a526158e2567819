"""The canonical weights of a model: names, shapes, and the checkpoint tensors that each is made of.

Query, key and value projections are one matrix, gate and up another, because one wide product is faster than
several. Names: ``embed_tokens``, ``norm``, ``lm_head`` (absent when tied), and for each layer ``layers.{i}.``
with ``input_norm``, ``post_norm``, ``qkv``, ``qkv_bias``, ``q_norm``, ``k_norm``, ``o``, ``o_bias``,
``gate_up``, ``down``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.kv_layout import DType
from diptych.worker.models.config import ModelConfig
from diptych.worker.models.fp8_weights import may_stay, quantize_rows, scale_name
from diptych.worker.parallel import ONE_RANK, ParallelDims

DTYPES: dict[DType, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a checkpoint, by its name in each format."""

    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    # Number of heads whose rows GGUF's llama converter interleaves for its own rotation; None: rows as in
    # Hugging Face.
    interleaved_heads: int | None = None
    axis: int = 0  # along which ranks cut it
    # Pieces that are never cut; 0, or a number that the ranks do not divide: every rank holds all of it.
    units: int = 0

    def cut(self, dims: ParallelDims) -> range:
        """The indices along `axis` that a rank holds."""
        if not self.units or not dims.spreads(self.units):
            return range(self.shape[self.axis])
        pieces, size = dims.part(self.units), self.shape[self.axis] // self.units
        return range(pieces.start * size, pieces.stop * size)

    def local_shape(self, dims: ParallelDims) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.axis] = len(self.cut(dims))
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One canonical weight: its parts one after the other along the first axis."""

    name: str
    parts: tuple[Part, ...]
    added_once: bool = False  # to a sum over all ranks: zero on all but the first

    @property
    def shape(self) -> tuple[int, ...]:
        return self.local_shape(ONE_RANK)

    def local_shape(self, dims: ParallelDims) -> tuple[int, ...]:
        shapes = [part.local_shape(dims) for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def local(self, weight: Tensor, dims: ParallelDims) -> Tensor:
        """A rank's part of the whole weight."""
        if dims.tp_size == 1:
            return weight
        if self.added_once and dims.tp_rank:
            return torch.zeros_like(weight)
        wholes = torch.split(weight, [part.shape[0] for part in self.parts])
        pieces = []
        for part, whole in zip(self.parts, wholes, strict=True):
            cut = part.cut(dims)
            pieces.append(whole.narrow(part.axis, cut.start, len(cut)))
        return torch.cat(pieces)


def torch_dtype(config: ModelConfig) -> torch.dtype:
    return DTYPES[config.dtype]


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    vocab, hidden = config.vocab_size, config.hidden_size
    specs = [
        _single("embed_tokens", "model.embed_tokens.weight", "token_embd.weight", (vocab, hidden)),
        _single("norm", "model.norm.weight", "output_norm.weight", (hidden,)),
    ]
    if not config.tie_word_embeddings:
        head = Part("lm_head.weight", "output.weight", (vocab, hidden), units=vocab)
        specs.append(WeightSpec("lm_head", (head,)))
    for layer in range(config.num_layers):
        specs.extend(_layer(config, layer))
    return specs


def dummy_weights(
    config: ModelConfig,
    seed: int = 0,
    device: torch.device | None = None,
    *,
    dims: ParallelDims = ONE_RANK,
    keep_fp8: bool = False,
) -> dict[str, Tensor]:
    """Random weights that keep activations in range; the same seed gives the same model in every process that
    draws them on the same kind of device, whatever part of it the process keeps. `keep_fp8`: as loader.py, for a
    model that is quantized.
    """
    device = device or torch.device("cpu")
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch_dtype(config)
    is_fp8 = keep_fp8 and config.quantization.weights == "fp8"
    weights = {}
    for spec in weight_specs(config):
        if spec.name.endswith("norm"):
            weights[spec.name] = torch.ones(spec.shape, dtype=dtype, device=device)
        else:
            weight = torch.empty(spec.shape, dtype=dtype, device=device)
            weight.normal_(0.0, 0.02, generator=generator)
            if is_fp8 and may_stay(spec.name, spec.local_shape(dims)):
                values, scale = quantize_rows(weight)  # before the cut, as those of a checkpoint are
                weights[spec.name] = spec.local(values.view(torch.uint8), dims).view(values.dtype)
                scales = spec.local(scale[:, None].expand_as(values), dims)
                weights[scale_name(spec.name)] = scales[:, 0].contiguous()
            else:
                weights[spec.name] = spec.local(weight, dims)
    return weights


def _single(name: str, hf_name: str, gguf_name: str, shape: tuple[int, ...]) -> WeightSpec:
    return WeightSpec(name, (Part(hf_name, gguf_name, shape),))


def _layer(config: ModelConfig, layer: int) -> Iterator[WeightSpec]:
    ours, hf, gguf = f"layers.{layer}", f"model.layers.{layer}", f"blk.{layer}"
    hidden, inner = config.hidden_size, config.intermediate_size
    heads_width = config.num_heads * config.head_dim
    yield _single(f"{ours}.input_norm", f"{hf}.input_layernorm.weight", f"{gguf}.attn_norm.weight", (hidden,))
    yield _qkv(config, layer, "weight", f"{ours}.qkv")
    if config.qkv_bias:
        yield _qkv(config, layer, "bias", f"{ours}.qkv_bias")
    if config.qk_norm:
        for which in ("q_norm", "k_norm"):
            names = f"{hf}.self_attn.{which}.weight", f"{gguf}.attn_{which}.weight"
            yield _single(f"{ours}.{which}", *names, (config.head_dim,))
    output = f"{hf}.self_attn.o_proj", f"{gguf}.attn_output"
    names = f"{output[0]}.weight", f"{output[1]}.weight"
    yield WeightSpec(f"{ours}.o", (Part(*names, (hidden, heads_width), axis=1, units=config.num_heads),))
    if config.o_bias:
        bias = Part(f"{output[0]}.bias", f"{output[1]}.bias", (hidden,))
        yield WeightSpec(f"{ours}.o_bias", (bias,), added_once=True)
    yield _single(
        f"{ours}.post_norm", f"{hf}.post_attention_layernorm.weight", f"{gguf}.ffn_norm.weight", (hidden,)
    )
    gate = Part(f"{hf}.mlp.gate_proj.weight", f"{gguf}.ffn_gate.weight", (inner, hidden), units=inner)
    up = Part(f"{hf}.mlp.up_proj.weight", f"{gguf}.ffn_up.weight", (inner, hidden), units=inner)
    yield WeightSpec(f"{ours}.gate_up", (gate, up))
    names = f"{hf}.mlp.down_proj.weight", f"{gguf}.ffn_down.weight"
    yield WeightSpec(f"{ours}.down", (Part(*names, (hidden, inner), axis=1, units=inner),))


def _qkv(config: ModelConfig, layer: int, kind: str, name: str) -> WeightSpec:
    tail = (config.hidden_size,) if kind == "weight" else ()

    def part(letter: str, heads: int) -> Part:
        interleaved = config.family in ("llama", "mistral") and letter != "v"
        return Part(
            f"model.layers.{layer}.self_attn.{letter}_proj.{kind}",
            f"blk.{layer}.attn_{letter}.{kind}",
            (heads * config.head_dim, *tail),
            interleaved_heads=heads if interleaved else None,
            units=heads,
        )

    kv = config.num_kv_heads
    return WeightSpec(name, (part("q", config.num_heads), part("k", kv), part("v", kv)))
