"""A 64-bit digest of the bytes of each KV block, the same on a GPU and on a CPU.

    digest = sum over the block's 64-bit words w at position i, modulo 2**64, of
             (low(w) + k(i)) * (high(w) + l(i)) + w

with 32-bit halves that wrap and two 32-bit keys made from the position (the NH construction with the word
itself added). A sum does not depend on the order of its terms: a copy kernel can build it from whatever pieces
it moves. It finds torn copies, wrong blocks, exchanged and flipped bits; no adversary.

`word_terms` is plain torch for any device, `digest_bytes` numpy for host memory; on a GPU a Triton kernel of
block_copy_triton.py does the work.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WORD_BYTES = 8
KEY_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)

_LOW = 0xFFFFFFFF


def digest_blocks(pool: Tensor, block_ids: Tensor) -> Tensor:
    """`[len(block_ids)]` int64 digests (to be read as uint64) of a `[num_blocks, block_bytes]` uint8 pool.

    On a GPU it is queued on the current stream.
    """
    if pool.device.type == "cuda":
        from diptych.kernels.block_copy_triton import launch_digest

        return launch_digest(pool, block_ids)
    words = pool[block_ids].view(torch.int64)
    return word_terms(words, torch.arange(words.shape[1])).sum(dim=1)


def word_terms(words: Tensor, positions: Tensor) -> Tensor:
    """The term of each int64 word. int64 wraps as uint64 does: the bits are the same."""
    first, second, third = KEY_MULTIPLIERS
    mixed = (positions.to(torch.int64) * first) & _LOW
    mixed = mixed ^ (mixed >> 15)
    low = ((words & _LOW) + mixed * second) & _LOW
    high = (((words >> 32) & _LOW) + (mixed + third) * third) & _LOW
    return low * high + words


def digest_bytes(block: npt.NDArray[np.uint8]) -> int:
    """The digest of one block in host memory."""
    words = block.view(np.uint64)
    first, second, third = (np.uint32(multiplier) for multiplier in KEY_MULTIPLIERS)
    mixed = np.arange(len(words), dtype=np.uint32) * first
    mixed ^= mixed >> np.uint32(15)
    low = words.astype(np.uint32) + mixed * second
    high = (words >> np.uint64(32)).astype(np.uint32) + (mixed + third) * third
    return int((low.astype(np.uint64) * high + words).sum(dtype=np.uint64))
