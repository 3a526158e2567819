"""Which ranks of an owner a reader's rank copies from, and which layers and KV heads from each.

Pure. Knows the layouts that a ticket names; nothing of blocks, bytes or transports.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout

# What may differ between an owner's and a reader's rank: which part of the model it holds, and in what
# portions of tokens.
_FREE = frozenset(
    (
        "num_layers",
        "first_layer",
        "num_kv_heads",
        "total_kv_heads",
        "tokens_per_block",
        "tp_rank",
        "tp_size",
        "pp_rank",
        "pp_size",
    )
)


@dataclass(frozen=True, slots=True)
class Part:
    """From rank number `owner` of the ticket: these layers and KV heads, numbered over the whole model."""

    owner: int
    layers: range
    kv_heads: range


def choose_parts(owners: Sequence[KvLayout], reader: KvLayout) -> list[Part]:
    """Everything that the reader holds, each piece once. Readers spread over ranks that hold the same heads."""
    for owner in owners:
        require_compatible(owner, reader)
    held: dict[tuple[range, range], list[int]] = {}
    for number, owner in enumerate(owners):
        layers, heads = _common(owner.layers, reader.layers), _common(owner.kv_heads, reader.kv_heads)
        if layers and heads:
            held.setdefault((layers, heads), []).append(number)
    parts = [
        Part(numbers[reader.tp_rank % len(numbers)], layers, heads)
        for (layers, heads), numbers in held.items()
    ]
    # Distinct pieces that overlapped would be counted twice here.
    found = sum(len(part.layers) * len(part.kv_heads) for part in parts)
    if found != len(reader.layers) * len(reader.kv_heads) or _overlap(parts):
        raise TransferError(
            f"the owner's {len(owners)} ranks do not hold each of layers {_name(reader.layers)} and KV heads "
            f"{_name(reader.kv_heads)} once",
            code="layout",
        )
    return parts


def require_compatible(source: KvLayout, destination: KvLayout) -> None:
    """Blocks of one can be cut into blocks of the other."""
    theirs, ours = msgspec.structs.asdict(source), msgspec.structs.asdict(destination)
    # Tiles in the order of the CPU kernels cannot be cut between tokens.
    free = _FREE if source.inner == "hnd" else _FREE - {"tokens_per_block"}
    differing = [
        f"{name} is {theirs[name]!r} there and {ours[name]!r} here"
        for name in theirs
        if name not in free and theirs[name] != ours[name]
    ]
    if differing:
        raise TransferError(f"KV layouts differ: {', '.join(differing)}", code="layout")


def _overlap(parts: Sequence[Part]) -> bool:
    return any(
        _common(one.layers, other.layers) and _common(one.kv_heads, other.kv_heads)
        for i, one in enumerate(parts)
        for other in parts[:i]
    )


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _name(numbers: range) -> str:
    return f"{numbers.start} to {numbers.stop - 1}"
