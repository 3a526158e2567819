"""The state of all running sequences on the device, in one allocation that the host changes by number.

Every array below is a piece of one int32 arena. What the host wants to change in a step is a list of (index, value)
pairs over the arena: one small copy and one scatter, however many arrays are concerned. In a steady decode nothing
changes: tokens and positions advance on the device.
"""

from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int32s = npt.NDArray[np.int32]

_SLOT_FIELDS = (
    "tokens",  # the last known token, whose KV the next step computes
    "positions",  # of that token
    "prompt_lengths",
    "min_tokens",  # before an end may be drawn
    "temperature",  # float32
    "top_k",  # 0: off
    "top_p",  # float32
    "min_p",  # float32
    "seed_low",
    "seed_high",
)
_ALIGN = 4  # numbers: 16 bytes
_FLOATS = frozenset({"temperature", "top_p", "min_p"})


class DeviceState:
    """`rows` [num_slots] says which slot each row of a decode step belongs to, -1 for none."""

    def __init__(self, num_slots: int, max_blocks: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.max_blocks = max_blocks
        self.device = device
        names = ("rows", *_SLOT_FIELDS)
        self._offsets = {name: index * num_slots for index, name in enumerate(names)}
        self._tables_at = len(names) * num_slots
        arena = torch.zeros(self._tables_at + num_slots * max_blocks, dtype=torch.int32, device=device)
        self._arena = arena
        self.rows = self._field("rows")
        self.rows.fill_(-1)
        self.tables = arena[self._tables_at :].view(num_slots, max_blocks)
        self._staging = Staging(device)

    def field(self, name: str) -> Tensor:
        """`[num_slots]`, int32 or float32."""
        values = self._field(name)
        return values.view(torch.float32) if name in _FLOATS else values

    def at(self, name: str, slot: int) -> int:
        """The arena index of one value."""
        return self._offsets[name] + slot

    def table_at(self, slot: int, block: int) -> int:
        return self._tables_at + slot * self.max_blocks + block

    def upload(self, indices: Int32s, values: Int32s) -> None:
        """Queue the changes on the current stream."""
        if len(indices):
            at, changed = self._staging.send(indices, values)
            self._arena.scatter_(0, at.long(), changed)

    def _field(self, name: str) -> Tensor:
        start = self._offsets[name]
        return self._arena[start : start + self.num_slots]


class Staging:
    """Host memory that copies to the device read. When a send begins, the one before the last must be over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hosts = [self._allocate(1024) for _ in range(2)]

    def send(self, *arrays: Int32s) -> list[Tensor]:
        """The arrays on the device, each aligned for wide loads; queued on the current stream as one copy."""
        counts = [len(array) for array in arrays]
        return pieces(self._fill(counts, arrays).to(self._device, non_blocking=True), counts)

    def send_into(self, target: Tensor, *arrays: Int32s) -> None:
        """The same into the `pieces` of `target`, which has the room for just these."""
        target.copy_(self._fill([len(array) for array in arrays], arrays), non_blocking=True)

    def _fill(self, counts: list[int], arrays: tuple[Int32s, ...]) -> Tensor:
        size = room(counts)
        self._hosts.reverse()
        if size > len(self._hosts[0]):
            self._hosts[0] = self._allocate(2 * size)
        host = self._hosts[0][:size]
        for piece, array in zip(pieces(host, counts), arrays, strict=True):
            piece.numpy()[:] = array
        return host

    def _allocate(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, pin_memory=self._device.type == "cuda")


def room(counts: list[int]) -> int:
    """Of how many numbers `pieces` makes arrays."""
    return sum(_aligned(count) for count in counts)


def pieces(numbers: Tensor, counts: list[int]) -> list[Tensor]:
    """Arrays of so many numbers one after the other, each aligned for wide loads."""
    starts = accumulate((_aligned(count) for count in counts), initial=0)
    return [numbers[start : start + count] for start, count in zip(starts, counts, strict=False)]


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def seed_words(seed: int) -> tuple[int, int]:
    """Low and high half of a seed's low 64 bits, as int32."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return _signed(low), _signed(high)


def _signed(word: int) -> int:
    return word - (1 << 32) if word & 0x80000000 else word
