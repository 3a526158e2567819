"""The other ranks of an engine, as its rank 0 holds them: starts their processes, speaks with them, watches them.

A rank that ends takes the engine with it, at once: the others would wait for it in a collective for ever. Knows nothing
of models or blocks; what the transceiver wants of ranks is in rank_companions.py.
"""

import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import msgspec

from diptych.errors import StartupError
from diptych.transceiver.pool import Generations, KvPool
from diptych.transceiver.pool_memory import share_generations
from diptych.worker.rank_messages import (
    Begin,
    Channel,
    Described,
    Failed,
    Fetched,
    FromRank,
    Loaded,
    Meet,
    Started,
    Step,
    ToRank,
)
from diptych.worker.settings import EngineSettings

log = logging.getLogger(__name__)

_STOP_S = 3.0
_REPORT_S = 1.0

# Gets the one sentence that says which rank is gone and why; the engine ends there.
Lost = Callable[[str], None]


class Rank:
    """One other rank."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.replies: queue.SimpleQueue[Loaded | Started] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "diptych.worker.rank_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.channel = Channel(ours)

    def end(self) -> str:
        """How the process ended, for people."""
        try:
            code = self.process.wait(_REPORT_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class SharedGenerations:
    """The same numbers in the pools of all ranks: a peer checks those of the rank that it reads."""

    def __init__(self, pools: list[Generations]) -> None:
        self._pools = pools

    def __getitem__(self, block: int) -> int:
        return int(self._pools[0][block])

    def __setitem__(self, block: int, number: int) -> None:
        for pool in self._pools:
            pool[block] = number


class RankGroup:
    def __init__(self, settings: EngineSettings, lost: Lost) -> None:
        """Starts ranks 1 and up. `lost` is called once, from a thread, and must not return."""
        self._lost = lost
        self._closing = False
        self._lock = threading.Lock()
        self._calls: dict[tuple[int, int], queue.SimpleQueue[Described | Fetched]] = {}
        self.num_steps_done = 0
        self._settings = settings
        self.ranks = [Rank(number) for number in range(1, settings.dims.tp_size)]
        self._listeners = [
            threading.Thread(target=self._listen, args=(rank,), name=f"rank {rank.number}", daemon=True)
            for rank in self.ranks
        ]
        for listener in self._listeners:
            listener.start()

    def meet(self, place: str) -> None:
        for rank in self.ranks:
            self.send(rank, Meet(_settings_of(self._settings, rank.number), place))

    def wait_loaded(self) -> int:
        """Until all have their weights; the number of KV blocks that the least of them could hold.

        Has no deadline of its own: a rank that ends is noticed, and how long a load may take our parent knows.
        """
        counts = []
        for rank in self.ranks:
            reply = rank.replies.get()
            assert isinstance(reply, Loaded)
            counts.append(reply.num_blocks)
        return min(counts)

    def begin(self, num_blocks: int, max_seq_len: int) -> None:
        self._send_all(Begin(num_blocks, max_seq_len))

    def wait_started(self, memory: KvPool) -> "SharedGenerations":
        """Until all take steps; the generation numbers of `memory`, which is rank 0's pool, and of theirs."""
        shared = [memory.generations]
        for rank in self.ranks:
            reply = rank.replies.get()
            assert isinstance(reply, Started)
            shared.append(share_generations(rank.process.pid, reply.pool_fd, memory.identity))
        return SharedGenerations(shared)

    def send_step(self, step: Step) -> None:
        self._send_all(step)

    def step_done(self) -> None:
        """Rank 0 has collected one more step."""
        self.num_steps_done += 1

    def send(self, rank: Rank, message: ToRank) -> None:
        try:
            rank.channel.send(message)
        except OSError:
            if not self._closing:
                raise StartupError(f"rank {rank.number} of the engine {rank.end()}") from None

    def expect(self, rank: Rank, call: int) -> "queue.SimpleQueue[Described | Fetched]":
        """Where the rank's reply to a call will be; before the call is sent."""
        reply: queue.SimpleQueue[Described | Fetched] = queue.SimpleQueue()
        with self._lock:
            self._calls[rank.number, call] = reply
        return reply

    def wait_for_end(self) -> None:
        """A moment, for the end of a rank to be noticed: `lost` does not return."""
        for listener in self._listeners:
            listener.join(_REPORT_S / len(self._listeners))

    def close(self) -> None:
        """Ends all ranks: they stop when their connection closes, or are killed."""
        self._closing = True
        for rank in self.ranks:
            rank.channel.shut()
        for rank in self.ranks:
            try:
                rank.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()

    def _send_all(self, message: ToRank) -> None:
        for rank in self.ranks:
            self.send(rank, message)

    def _listen(self, rank: Rank) -> None:
        try:
            while True:
                self._take(rank, rank.channel.receive_from_rank())
        except (EOFError, OSError, msgspec.MsgspecError):
            if not self._closing:
                self._lose(f"rank {rank.number} of the engine {rank.end()}")

    def _take(self, rank: Rank, message: FromRank) -> None:
        match message:
            case Loaded() | Started():
                rank.replies.put(message)
            case Failed():
                self._lose(f"rank {rank.number} of the engine: {message.message}")
            case _:
                with self._lock:
                    reply = self._calls.pop((rank.number, message.call))
                reply.put(message)

    def _lose(self, sentence: str) -> None:
        with self._lock:  # of several that end, the first one tells why
            if not self._closing:
                self._lost(sentence)


def _settings_of(settings: EngineSettings, number: int) -> EngineSettings:
    return msgspec.structs.replace(
        settings,
        dims=replace(settings.dims, tp_rank=number),
        log_level="error",  # rank 0 says the rest for all
        incarnation=f"{settings.incarnation}.{number}",
    )
