"""The shape of a KV pool: what two engines must agree on before blocks can move between them.

A pool is one allocation per rank, block-major: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block,
head_dim]`` (K is index 0, V is index 1). All layers of a block are therefore one contiguous span of
`block_bytes`, and a transfer needs one descriptor per block. Knows nothing of torch or devices.
"""

import hashlib
from typing import Literal

import msgspec

DType = Literal["bfloat16", "float16", "float32", "float8_e4m3fn"]
Inner = Literal["hnd", "vnni"]

_ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Layout of one rank's pool.

    `inner` names the order of elements inside one (layer, K or V, head) tile of a block: "hnd" is
    ``[tokens_per_block, head_dim]`` row-major, the layout of every GPU pool; "vnni" is the CPU kernels' order
    (see kernels/cpu_step.py), of equal size. Blocks move raw, so both ends must have the same inner order.
    """

    num_layers: int
    num_kv_heads: int  # of this rank
    head_dim: int
    tokens_per_block: int
    dtype: DType = "bfloat16"
    inner: Inner = "hnd"
    model: str = ""  # digest of the weights' identity: KV of another model is never accepted
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    first_layer: int = 0  # this rank's first layer in the whole model
    total_kv_heads: int | None = None  # of all ranks; None: num_kv_heads * tp_size, so no head is held twice

    @property
    def layers(self) -> range:
        """This rank's layers in the whole model."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    @property
    def kv_heads(self) -> range:
        """This rank's KV heads in the whole model; with more ranks than heads, neighbours hold the same one."""
        total = self.total_kv_heads or self.num_kv_heads * self.tp_size
        first = self.tp_rank * total // self.tp_size
        return range(first, first + self.num_kv_heads)

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        tile = self.tokens_per_block * self.head_dim * self.item_bytes
        return self.num_layers * 2 * self.num_kv_heads * tile

    @property
    def bytes_per_token(self) -> int:
        return self.block_bytes // self.tokens_per_block

    def fingerprint(self) -> str:
        """16 hex digits: equal if and only if blocks can be copied as they are."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=8).hexdigest()
