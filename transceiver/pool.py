"""What the transceiver asks of a rank's KV pool, wherever its blocks are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from diptych.transceiver.pool_memory import PoolIdentity

Bytes = npt.NDArray[np.uint8]
Generations = npt.NDArray[np.uint64]
Digests = npt.NDArray[np.uint64]

# xxh3_64: over a block's bytes, the fastest on a CPU. nh_64: kernels/block_digest.py, the fastest on a GPU.
DigestKind = Literal["xxh3_64", "nh_64"]


class KvPool(Protocol):
    """Blocks and their generation numbers. The file descriptor is a memfd that proves whose pool this is."""

    fd: int
    generations: Generations

    @property
    def identity(self) -> "PoolIdentity": ...

    @property
    def digest_kind(self) -> DigestKind:
        """The digest that `digest` computes."""
        ...

    def digest(self, block_ids: Sequence[int]) -> list[int]: ...

    def close(self) -> None: ...
