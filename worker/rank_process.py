"""Another rank of an engine: `python -m diptych.worker.rank_process FD`, of a socket to rank 0.

That is its parent (rank_group.py), whose steps it repeats on its part of the model; it dies with it. It has no
scheduler, draws no tokens, and holds no leases.
"""

import logging
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from diptych import logs
from diptych.errors import StartupError
from diptych.worker.process import end_with_parent
from diptych.worker.rank_messages import (
    AbortFetch,
    Begin,
    Channel,
    Describe,
    Described,
    Failed,
    Fetch,
    Fetched,
    Forget,
    Loaded,
    Meet,
    Started,
    Step,
    ToRank,
)

log = logging.getLogger("diptych.worker.rank_process")  # this module is __main__


def main() -> None:
    end_with_parent()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    code = 1
    try:
        _build(channel).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        code = 0  # rank 0 is gone, or has closed: so do we
    except StartupError as error:
        channel.send(Failed(error.message))
    except Exception:
        log.exception("rank failed")
    finally:
        # Communicators and threads of libraries may wait for the other ranks, and those for our end.
        os._exit(code)


def _build(channel: Channel) -> "Follower":
    import torch  # noqa: F401  # while rank 0 does the same

    meeting = channel.receive_to_rank()
    assert isinstance(meeting, Meet)
    settings = meeting.settings
    logs.configure(settings.log_level)

    from diptych.worker import assembly
    from diptych.worker.collectives import ProcessGroup
    from diptych.worker.kv_memory import create_pool, require_device
    from diptych.worker.models.loader import load_config

    dims = settings.dims
    device = require_device(settings)
    assembly.prepare(settings)
    ranks = ProcessGroup(meeting.place, dims.tp_rank, dims.tp_size, device)
    loaded = assembly.load(settings, load_config(Path(settings.model_path)), ranks, _show_nothing)
    channel.send(Loaded(loaded.num_blocks))
    begin = channel.receive_to_rank()
    assert isinstance(begin, Begin)
    memory, tensor = create_pool(settings, loaded.layout, begin.num_blocks)
    wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    transceiver = assembly.open_transceiver(
        settings, memory, loaded.layout, lambda: os.eventfd_write(wake_fd, 1)
    )
    runner = loaded.computer.start(tensor, begin.max_seq_len, _show_nothing)
    channel.send(Started(memory.fd))
    return Follower(channel, runner, transceiver, wake_fd)


class Follower:
    """Repeats rank 0's steps, in order; answers for the blocks of this rank."""

    def __init__(self, channel: Channel, runner: Any, transceiver: Any, wake_fd: int) -> None:
        from diptych.worker.step_mirror import StepDecoder

        self._channel = channel
        self._runner = runner
        self._transceiver = transceiver
        self._wake_fd = wake_fd
        self._decoder = StepDecoder()
        self._under_way: list[Any] = []
        self._num_done = 0
        self._fetches: dict[int, int] = {}  # of our transceiver -> the call
        self._calls: dict[int, int] = {}  # and back
        self._lingering: dict[tuple[int, ...], Fetched] = {}  # by the blocks: told when nothing writes there

    def run(self) -> None:
        """Until the connection is closed: EOFError."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
                self._report_fetches()
            if self._channel.fileno() in ready:
                self._take(self._channel.receive_to_rank())

    def _take(self, message: ToRank) -> None:
        match message:
            case Step():
                self._under_way.append(self._runner.launch(self._decoder.decode(message)))
                self._collect(len(self._under_way) - 1)
            case Describe():
                self._collect(message.num_steps - self._num_done)
                owner = self._transceiver.owner(message.block_ids, message.num_tokens)
                self._channel.send(Described(message.call, msgspec.msgpack.encode(owner)))
            case Fetch():
                fetch_id = self._transceiver.fetch(
                    message.ticket, message.source_indices, message.destination_blocks
                )
                self._fetches[fetch_id], self._calls[message.call] = message.call, fetch_id
            case AbortFetch():
                if message.call in self._calls:
                    self._transceiver.abort(self._calls[message.call])
            case Forget():
                self._transceiver.forget(message.incarnation)

    def _collect(self, count: int) -> None:
        """Wait for the oldest `count` steps under way."""
        for _ in range(count):
            self._runner.collect(self._under_way.pop(0))
            self._num_done += 1

    def _report_fetches(self) -> None:
        from diptych.transceiver.settings import FetchDone, FetchFailed, QuarantineEnded

        for event in self._transceiver.poll(time.monotonic()):
            match event:
                case FetchDone():
                    self._channel.send(Fetched(self._end(event.fetch_id), num_bytes=event.bytes))
                case FetchFailed():
                    failed = Fetched(self._end(event.fetch_id), code=event.code, message=event.message)
                    if event.held:
                        self._lingering[event.held] = failed
                    else:
                        self._channel.send(failed)
                case QuarantineEnded():
                    self._channel.send(self._lingering.pop(event.block_ids))

    def _end(self, fetch_id: int) -> int:
        call = self._fetches.pop(fetch_id)
        del self._calls[call]
        return call


def _show_nothing(message: str, fraction: float) -> None:
    """Rank 0 does as much at the same time, and shows it."""


if __name__ == "__main__":
    main()
