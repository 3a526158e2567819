"""Triton kernels of block_copy.py and block_digest.py; see there for what they compute.

One kernel, a fixed number of programs: each takes one share of a row after the other. A share is cut into tiles
of 32 KiB, loaded with one instruction burst, so that few programs keep a whole link busy: 32 of them leave the
other three quarters of an H200 to decode.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diptych.kernels.block_copy import CopyGrid
from diptych.kernels.block_digest import KEY_MULTIPLIERS, WORD_BYTES

TILE_WORDS = 4096
NUM_WARPS = 16
_SHARES_PER_PROGRAM = 8  # enough that no program waits long for the last ones
_MAX_SHARE_TILES = 16

_FIRST = tl.constexpr(KEY_MULTIPLIERS[0])
_SECOND = tl.constexpr(KEY_MULTIPLIERS[1])
_THIRD = tl.constexpr(KEY_MULTIPLIERS[2])


@triton.jit
def _terms(words, positions):  # type: ignore[no-untyped-def]
    bits = words.to(tl.uint64, bitcast=True)
    mixed = positions.to(tl.uint32) * _FIRST.to(tl.uint32)
    mixed = mixed ^ (mixed >> 15)
    low = bits.to(tl.uint32) + mixed * _SECOND
    high = (bits >> 32).to(tl.uint32) + (mixed + _THIRD) * _THIRD
    return low.to(tl.uint64) * high.to(tl.uint64) + bits
