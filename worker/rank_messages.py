"""What the ranks of one engine say to each other between steps: msgpack over one socket pair for each rank.

Rank 0 sends steps and what the transceiver wants done; a rank answers. Inside a step ranks use collectives.py.
"""

import contextlib
import os
import socket
import threading
from multiprocessing.connection import Connection

import msgspec

from diptych.wire import Submit
from diptych.worker.settings import EngineSettings


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    """First message to a rank: what it is, and where all meet for their collectives."""

    settings: EngineSettings
    place: str


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The size of the pool on every rank, and the longest sequence."""

    num_blocks: int
    max_seq_len: int


class ChunkNote(msgspec.Struct, frozen=True, array_like=True):
    """One chunk of a step, with what has changed of its sequence since the last one."""

    number: int  # of the sequence, on this engine
    start: int
    count: int
    draws: bool
    tokens: list[int]
    blocks: list[int]
    fresh_blocks: bool = False  # these are all: it was preempted
    submit: Submit | None = None  # the rank does not know the sequence


class Step(msgspec.Struct, frozen=True, tag="step"):
    chunks: list[ChunkNote]
    idle: list[int]  # sequences that no longer run
    gone: list[int]  # and those that never will again


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Asks for the rank's part of blocks that are complete after so many steps."""

    call: int
    num_steps: int
    block_ids: list[int]
    num_tokens: int


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    call: int
    ticket: bytes
    source_indices: list[int]
    destination_blocks: list[int]


class AbortFetch(msgspec.Struct, frozen=True, tag="abort"):
    call: int


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    incarnation: str


ToRank = Meet | Begin | Step | Describe | Fetch | AbortFetch | Forget


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The weights are there, and so many blocks would fit beside them."""

    num_blocks: int


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The rank takes steps. `pool_fd`: of the file with its pool's generation numbers, in its process."""

    pool_fd: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The last message of a rank that cannot start, in one sentence."""

    message: str


class Described(msgspec.Struct, frozen=True, tag="described"):
    call: int
    owner: bytes  # an OwnerRank


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """`code`: of a TransferError, empty when there was none."""

    call: int
    num_bytes: int = 0
    code: str = ""
    message: str = ""


FromRank = Loaded | Started | Failed | Described | Fetched

_ENCODER = msgspec.msgpack.Encoder()
_TO_RANK = msgspec.msgpack.Decoder(ToRank)
_FROM_RANK = msgspec.msgpack.Decoder(FromRank)


class Channel:
    """One end of the socket pair. Any thread may send, one receives. EOFError or OSError: the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._connection = Connection(end.detach())
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: ToRank | FromRank) -> None:
        data = _ENCODER.encode(message)
        with self._lock:
            self._connection.send_bytes(data)

    def receive_to_rank(self) -> ToRank:
        message: ToRank = _TO_RANK.decode(self._connection.recv_bytes())
        return message

    def receive_from_rank(self) -> FromRank:
        message: FromRank = _FROM_RANK.decode(self._connection.recv_bytes())
        return message

    def shut(self) -> None:
        """Both ends see the end of the stream; a thread that receives here, too."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
