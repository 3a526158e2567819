"""The identity of a KV block: a chain of 128-bit hashes over token ids, the same in engines and routers.

An engine finds its blocks by whole hashes. Routers and block events use their first eight bytes, the block's
*key*: a collision there costs one badly chosen worker, never wrong KV.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

ALGORITHM = "blake2b-128/int32"  # whoever compares keys of two processes compares this first

_KEY_BYTES = 8


def first_parent(cache_salt: str) -> bytes:
    """What takes the parent's place in a prompt's first block.

    Hashed under a name of its own: a salt must not be able to pose as the hash of somebody's block.
    """
    if not cache_salt:
        return b""
    return hashlib.blake2b(cache_salt.encode(), digest_size=16, person=b"cache_salt").digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """128-bit hash of a full block; `parent` is the hash of the one before, or `first_parent`."""
    return hashlib.blake2b(array("i", token_ids).tobytes(), key=parent, digest_size=16).digest()


def block_key(block_hash: bytes) -> int:
    return int.from_bytes(block_hash[:_KEY_BYTES], "little")


def block_keys(token_ids: Sequence[int], tokens_per_block: int, cache_salt: str = "") -> list[int]:
    """The keys of a prompt's full blocks."""
    keys = []
    parent = first_parent(cache_salt)
    for end in range(tokens_per_block, len(token_ids) + 1, tokens_per_block):
        parent = hash_block(parent, token_ids[end - tokens_per_block : end])
        keys.append(block_key(parent))
    return keys


def num_reusable_blocks(num_tokens: int, tokens_per_block: int) -> int:
    """How many blocks of a sequence an engine may take from its cache: one known token is left to compute."""
    return (num_tokens - 1) // tokens_per_block


def pack_keys(keys: Iterable[int]) -> bytes:
    """Little-endian, eight bytes each."""
    return _little(array("Q", keys)).tobytes()


def unpack_keys(packed: bytes) -> "array[int]":
    """Raises ValueError when the bytes are not whole keys."""
    keys = array("Q")
    keys.frombytes(packed)
    return _little(keys)


def _little(keys: "array[int]") -> "array[int]":
    if _BIG_ENDIAN:
        keys.byteswap()
    return keys


_BIG_ENDIAN = array("H", [1]).tobytes() == b"\0\1"
