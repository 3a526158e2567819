"""Several router processes on one port: started, replaced when they die or on SIGUSR2, stopped.

Each process is a whole router of its own. The supervisor opens one listening socket for each (SO_REUSEPORT: the
kernel spreads connections over them) and keeps it: connections that wait for a process which is being replaced
are served by its successor, and none is lost.

    SIGUSR2           new processes take the places of the old one after another; the old ones finish what runs
    SIGTERM, SIGINT   all stop accepting, finish what runs, end
"""

import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from diptych import logs
from diptych.discovery import Registry
from diptych.errors import StartupError
from diptych.listen import open_listener
from diptych.router.settings import Limits
from diptych.router.snapshots import Snapshots

_log = logging.getLogger(__name__)
_START_S = 30.0  # until a new process serves
_RESTART_S = 1.0  # before one that died is started again
_CANNOT_START = 2  # exit code
RETIRE = signal.SIGUSR2  # to the supervisor: replace all; to a process: a successor is there
_SIGNALS = (signal.SIGTERM, signal.SIGINT, RETIRE)


class ProcessSettings(Protocol):
    @property
    def hostname(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def log_level(self) -> str: ...


Settings = TypeVar("Settings", bound=ProcessSettings)


@dataclass(frozen=True)
class Share(Generic[Settings]):
    """What one process is given."""

    config: Settings
    make_registry: Callable[[Settings], Registry]
    slot: int
    listener: socket.socket
    folder: Path
    started: Connection

    def snapshots(self) -> Snapshots:
        return Snapshots(self.folder, f"{self.slot}-{os.getpid()}")

    def report_start(self) -> None:
        with self.started, suppress(BrokenPipeError):  # nobody waits for one that replaces a dead process
            self.started.send(True)


class Processes(Generic[Settings]):
    def __init__(
        self,
        config: Settings,
        make_registry: Callable[[Settings], Registry],
        run_share: Callable[[Share[Settings]], None],
    ) -> None:
        self._config = config
        self._make_registry = make_registry
        self._run_share = run_share
        self._context = multiprocessing.get_context("spawn")
        self._listeners: list[socket.socket] = []
        self._current: list[SpawnProcess] = []
        self._leaving: list[SpawnProcess] = []
        self._folder = Path()

    def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises StartupError when the processes cannot serve."""
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diptych-router-")))
            wakeup = stack.enter_context(_Signals())
            for _ in range(self._config.num_workers):
                listener = open_listener(self._config.hostname, self._port, reuse_port=True)
                self._listeners.append(stack.enter_context(listener))
            stack.callback(self._stop)
            self._start_all()
            self._supervise(wakeup)

    @property
    def _port(self) -> int:
        """The same for all, also when the configuration leaves the choice to the kernel."""
        return self._listeners[0].getsockname()[1] if self._listeners else self._config.port

    def _start_all(self) -> None:
        waiting = [self._start(slot) for slot in range(self._config.num_workers)]
        self._current = [process for process, _ in waiting]
        for process, started in waiting:
            if not self._serves(process, started):
                raise StartupError("a router process cannot start; the line above says why")

    def _supervise(self, wakeup: "_Signals") -> None:
        while True:
            wait([wakeup.receiver, *(process.sentinel for process in self._current + self._leaving)])
            for number in wakeup.take():
                if number != RETIRE:
                    return
                self._replace_all(wakeup)
            self._leaving = [process for process in self._leaving if process.exitcode is None]
            for slot, process in enumerate(self._current):
                if process.exitcode is not None:
                    _log.error("router process %s ended with %s", process.pid, process.exitcode)
                    time.sleep(_RESTART_S)
                    self._current[slot], _ = self._start(slot)

    def _replace_all(self, wakeup: "_Signals") -> None:
        """One after another, so that there are never fewer than there should be."""
        for slot in range(len(self._current)):
            successor, started = self._start(slot)
            if not self._serves(successor, started):
                _log.error("router process %s does not start: keeping the old ones", successor.pid)
                successor.kill()
                return
            old, self._current[slot] = self._current[slot], successor
            _log.info("router process %s takes the place of %s", successor.pid, old.pid)
            assert old.pid is not None
            os.kill(old.pid, RETIRE)
            self._leaving.append(old)
            if wakeup.is_stopping:
                return

    def _start(self, slot: int) -> tuple[SpawnProcess, Connection]:
        receiver, sender = self._context.Pipe(duplex=False)
        share = Share(self._config, self._make_registry, slot, self._listeners[slot], self._folder, sender)
        process = self._context.Process(target=_main, args=(self._run_share, share), name=f"router-{slot}")
        process.start()
        sender.close()
        return process, receiver

    def _serves(self, process: SpawnProcess, started: Connection) -> bool:
        with started:
            if not wait([started, process.sentinel], timeout=_START_S):
                return False
            try:
                return started.poll() and bool(started.recv())
            except EOFError:
                return False

    def _stop(self) -> None:
        for listener in self._listeners:
            listener.close()
        processes = self._current + self._leaving
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + Limits().shutdown_s + 5.0
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                _log.error("router process %s does not stop and is killed", process.pid)
                process.kill()
                process.join()


def _main(run_share: Callable[[Share[Settings]], None], share: Share[Settings]) -> None:
    logs.configure(share.config.log_level)
    try:
        run_share(share)
    except StartupError as error:
        _log.error("%s", error.message)
        raise SystemExit(_CANNOT_START) from None


class _Signals:
    """Signals as something that can be waited for together with processes; use as ``with``."""

    def __init__(self) -> None:
        self.receiver, self._sender = socket.socketpair()
        self._previous: dict[int, object] = {}
        self.is_stopping = False

    def __enter__(self) -> "_Signals":
        self.receiver.setblocking(False)
        self._sender.setblocking(False)
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.receiver.close()
        self._sender.close()

    def take(self) -> list[int]:
        try:
            return list(self.receiver.recv(64))
        except BlockingIOError:
            return []

    def _note(self, number: int, frame: object) -> None:
        self.is_stopping = self.is_stopping or number != RETIRE
        self._sender.send(bytes([number]))
