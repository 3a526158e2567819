"""The router as a process, or as several that share one port.

Each process is a whole router of its own: the kernel spreads connections over them, and they share nothing.
This one then only starts them, replaces one that dies, and stops them.
"""

import asyncio
import gc
import importlib.util
import logging
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, TypeVar

from diptych import logs
from diptych.discovery import Registry
from diptych.errors import StartupError
from diptych.router.app import run
from diptych.router.settings import Limits, RouterSettings

_log = logging.getLogger(__name__)
_CHECK_S = 0.25  # how often a stop is looked for
_RESTART_S = 1.0
_CANNOT_START = 2  # exit code


class ServerSettings(RouterSettings, Protocol):
    @property
    def num_workers(self) -> int: ...
    @property
    def log_level(self) -> str: ...


Settings = TypeVar("Settings", bound=ServerSettings)


def serve(config: Settings, make_registry: Callable[[Settings], Registry]) -> None:
    """Serve until SIGTERM or SIGINT. With several processes, `make_registry` must be importable by name."""
    _allow_many_connections()
    if config.num_workers == 1:
        _run_loop(_route(config, make_registry, reuse_port=False))
    else:
        _supervise(config, make_registry)


async def _route(
    config: Settings, make_registry: Callable[[Settings], Registry], *, reuse_port: bool
) -> None:
    registry = make_registry(config)
    stop = asyncio.Event()
    parent = multiprocessing.parent_process()
    if parent is not None:  # a supervisor that was killed takes its routers along
        asyncio.get_running_loop().add_reader(parent.sentinel, stop.set)
    try:
        await run(config, registry, reuse_port=reuse_port, stop=stop)
    finally:
        await registry.close()


def _run_loop(main: Coroutine[Any, Any, None]) -> None:
    gc.freeze()  # modules are for ever: no reason to walk them in each full collection
    if importlib.util.find_spec("uvloop") is None:
        asyncio.run(main)
    else:
        import uvloop

        uvloop.run(main)


def _one_of_several(config: Settings, make_registry: Callable[[Settings], Registry]) -> None:
    logs.configure(config.log_level)
    try:
        _run_loop(_route(config, make_registry, reuse_port=True))
    except StartupError as error:
        _log.error("%s", error.message)
        raise SystemExit(_CANNOT_START) from None


def _supervise(config: Settings, make_registry: Callable[[Settings], Registry]) -> None:
    context = multiprocessing.get_context("spawn")
    stopping: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: stopping.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }

    def start() -> SpawnProcess:
        process = context.Process(target=_one_of_several, args=(config, make_registry), name="router")
        process.start()
        return process

    processes = [start() for _ in range(config.num_workers)]
    try:
        while not stopping:
            wait([process.sentinel for process in processes], timeout=_CHECK_S)
            for index, process in enumerate(processes):
                if process.exitcode == _CANNOT_START:
                    raise StartupError("a router process cannot start; the line above says why")
                if process.exitcode is not None and not stopping:
                    _log.error("router process %s ended with %s", process.pid, process.exitcode)
                    time.sleep(_RESTART_S)
                    processes[index] = start()
    finally:
        _stop(processes)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(processes: list[SpawnProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + Limits().shutdown_s + 5.0
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            _log.error("router process %s does not stop and is killed", process.pid)
            process.kill()
            process.join()


def _allow_many_connections() -> None:
    """Two sockets for each stream: the usual soft limit of 1024 files ends at 500 streams."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
