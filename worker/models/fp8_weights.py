"""Weights in FP8 (e4m3): as checkpoints store them, and as this engine keeps them.

A quantized tensor ``X.weight`` of a checkpoint has its scales in ``X.weight_scale`` (one, or one for each output) or in
``X.weight_scale_inv`` (one for each block): a number times its scale is the weight. What is kept is the stored numbers
with one float32 scale for each output, so that projections with scales of their own can be one matrix. Scales of
activations are not read: activations get one for each token when they are quantized, which is never less exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.errors import ModelLoadError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_SCALES = ("_scale", "_scale_inv")
# The canonical weights that may stay in FP8; their inputs and outputs must be multiples of _ALIGNMENT.
_PROJECTIONS = ("qkv", "o", "gate_up", "down")
_ALIGNMENT = 16


def may_stay(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the FP8 kernels take a canonical weight."""
    is_projection = name.rpartition(".")[2] in _PROJECTIONS
    return is_projection and all(size % _ALIGNMENT == 0 for size in shape)


def scale_name(name: str) -> str:
    """Of a canonical weight's scales, `[outputs]` float32, among the canonical weights."""
    return f"{name}_scale"


def scale_names(name: str) -> tuple[str, ...]:
    """What a checkpoint may call the scales of its tensor `name`."""
    return tuple(name + suffix for suffix in _SCALES)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Rows of a weight as a checkpoint holds them."""

    values: Tensor
    scale: Tensor | None  # float32 [1, 1], [rows, 1] or [rows, inputs]; None: not quantized

    @classmethod
    def of(
        cls, name: str, values: Tensor, scale: Tensor | None, block: tuple[int, int] | None
    ) -> "StoredWeight":
        """`block` as in Quantization. ModelLoadError for numbers and scales that do not fit each other."""
        if values.itemsize > 1 and scale is None:
            return cls(values, None)
        if values.dtype != FP8 or scale is None:
            held = "no scale" if scale is None else f"a scale for {str(values.dtype).removeprefix('torch.')}"
            raise ModelLoadError(
                f"Tensor {name} has {held}; quantized weights are float8_e4m3fn with a scale."
            )
        scale = scale.float()
        if block is not None:
            return cls(values, _spread(name, values, scale, block))
        if scale.numel() not in (1, len(values)):
            raise ModelLoadError(
                f"Tensor {name} has scales {list(scale.shape)}; one, or one for each of its {len(values)} rows, "
                "is needed."
            )
        return cls(values, scale.reshape(-1, 1))

    def times(self, factor: float) -> "StoredWeight":
        if self.scale is None:
            return StoredWeight(self.values * factor, None)
        return StoredWeight(self.values, self.scale * factor)

    def part(self, axis: int, cut: range) -> "StoredWeight":
        """The indices `cut` along an axis."""
        scale = self.scale
        if scale is not None and scale.shape[axis] > 1:
            scale = scale.narrow(axis, cut.start, len(cut))
        return StoredWeight(self.values.narrow(axis, cut.start, len(cut)), scale)

    def plain(self) -> Tensor:
        """The weight itself: float32 when it was quantized, else as it is stored."""
        return self.values if self.scale is None else self.values.float() * self.scale

    @property
    def has_row_scales(self) -> bool:
        return self.scale is not None and self.scale.shape[1] == 1

    def row_scales(self) -> Tensor:
        """`[rows]` float32."""
        assert self.scale is not None
        return self.scale.expand(len(self.values), 1).reshape(-1)


def _spread(name: str, values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The scale of each element, of those of its blocks."""
    blocks = [-(-size // step) for size, step in zip(values.shape, block, strict=True)]
    if list(scale.shape) != blocks:
        raise ModelLoadError(f"Tensor {name} has scales {list(scale.shape)}; its blocks need {blocks}.")
    for axis, (size, step) in enumerate(zip(values.shape, block, strict=True)):
        scale = scale.repeat_interleave(step, axis).narrow(axis, 0, size)
    return scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[rows, n]` to FP8 and each row's scale, `[rows]` float32: the largest number of a row becomes FP8_MAX."""
    wide = x.float()
    scale = wide.abs().amax(1).clamp_min(1e-12) / FP8_MAX
    return (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale
