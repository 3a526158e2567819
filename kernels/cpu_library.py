"""The C interface of the CPU step: its structures, the names of its weights, and which form of it runs here.

Knows how to ask for a library and what shapes it takes; holds no weights and runs nothing.
"""

import ctypes
import dataclasses
import os
from dataclasses import dataclass

from diptych.kernels import cpu_build
from diptych.kernels.cpu_build import KernelUnavailable

ISA_NAMES = ("portable", "avx512_bf16", "amx")
BLOCK_SIZES = (16, 32, 64, 128, 256)
MATRICES = {"qkv": 0, "o": 1, "gate_up": 2, "down": 3, "lm_head": 4}
VECTORS = {
    "input_norm": 0,
    "post_norm": 1,
    "qkv_bias": 2,
    "q_norm": 3,
    "k_norm": 4,
    "norm": 5,
    "cos": 6,
    "sin": 7,
}


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the kernels need to know of a model; `attention_scale` None means head_dim ** -0.5."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tokens_per_block: int
    rms_norm_eps: float
    attention_scale: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    sliding_window: int | None = None


def supports(shape: StepShape) -> str | None:
    """None when the kernels can run this shape, else the reason why not."""
    for name in ("hidden_size", "intermediate_size", "head_dim"):
        value = getattr(shape, name)
        if value <= 0 or value % 32:
            return f"{name} is {value}; the CPU kernels need a multiple of 32"
    for name in ("num_layers", "num_kv_heads", "vocab_size"):
        if getattr(shape, name) <= 0:
            return f"{name} is {getattr(shape, name)}; it must be positive"
    if shape.num_heads <= 0 or shape.num_heads % shape.num_kv_heads:
        return f"num_heads is {shape.num_heads}; it must be a multiple of num_kv_heads ({shape.num_kv_heads})"
    if shape.tokens_per_block not in BLOCK_SIZES:
        return f"tokens_per_block is {shape.tokens_per_block}; the CPU kernels need one of {BLOCK_SIZES}"
    if shape.sliding_window is not None and shape.sliding_window <= 0:
        return f"sliding_window is {shape.sliding_window}; it must be positive or None"
    if shape.attention_scale is not None and not shape.attention_scale > 0:
        return f"attention_scale is {shape.attention_scale}; it must be positive or None"
    return None


def isa() -> str:
    """Which form runs on this machine: "amx", "avx512_bf16" or "portable". Builds the kernels if need be."""
    return ISA_NAMES[load()[1]]


_INTEGERS = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "tokens_per_block",
    "max_positions",
    "sliding_window",
    "qk_norm",
    "qkv_bias",
)


class Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in _INTEGERS),
        ("rms_norm_eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("sequence_ids", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("logits_rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("num_logits", ctypes.c_int32),
        ("logits", ctypes.c_void_p),
    )


def load() -> tuple[ctypes.CDLL, int]:
    """The library and the number of the form to use."""
    wanted = os.environ.get("DIPTYCH_CPU_ISA") or None
    if wanted is not None and wanted not in ISA_NAMES:
        raise KernelUnavailable(f"DIPTYCH_CPU_ISA is {wanted!r}; it must be one of {', '.join(ISA_NAMES)}")
    library = cpu_build.load("cpu_step.cpp", portable=wanted == "portable")
    library.diptych_create.restype = ctypes.c_void_p
    best: int = library.diptych_isa()
    if wanted is None:
        return library, best
    form = ISA_NAMES.index(wanted)
    if form > best:
        raise KernelUnavailable(f"DIPTYCH_CPU_ISA is {wanted!r}, but this machine offers {ISA_NAMES[best]!r}")
    return library, form


def c_shape(shape: StepShape, max_positions: int) -> Shape:
    values = dataclasses.asdict(shape) | {"max_positions": max_positions}
    values["sliding_window"] = shape.sliding_window or 0
    values["attention_scale"] = shape.attention_scale or shape.head_dim**-0.5
    return Shape(**values)
