"""The router as a process: runs a Router until it is told to stop. With several processes, see processes.py."""

import asyncio
import gc
import importlib.util
import logging
import multiprocessing
import resource
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar

from diptych.discovery import Registry
from diptych.listen import open_listener
from diptych.router.metrics import Metrics
from diptych.router.processes import RETIRE, Processes, Share
from diptych.router.router import Router
from diptych.router.settings import Limits, RouterSettings

_GC_THRESHOLDS = (20_000, 20, 20)  # requests leave hardly any cycles behind
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger(__name__)


class ServerSettings(RouterSettings, Protocol):
    @property
    def log_level(self) -> str: ...


Settings = TypeVar("Settings", bound=ServerSettings)


def serve(config: Settings, make_registry: Callable[[Settings], Registry]) -> None:
    """Serve until SIGTERM or SIGINT. With several processes, `make_registry` must be importable by name."""
    _allow_many_connections()
    if config.num_workers > 1:
        Processes(config, make_registry, run_share).run()
        return
    with open_listener(config.hostname, config.port) as listener:
        _run_loop(_route(config, make_registry, listener, Metrics()))


def run_share(share: Share[Settings]) -> None:
    """The main function of one of several processes."""
    _allow_many_connections()
    metrics = Metrics(share.snapshots())
    _run_loop(_route(share.config, share.make_registry, share.listener, metrics, started=share.report_start))


async def _route(
    config: Settings,
    make_registry: Callable[[Settings], Registry],
    listener: socket.socket,
    metrics: Metrics,
    *,
    started: Callable[[], None] = lambda: None,
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    has_successor = False

    def retire() -> None:
        nonlocal has_successor
        if parent is None:
            _log.warning("one process cannot be replaced without a gap: set num_workers to 2 or more")
            return
        has_successor = True
        stop.set()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(RETIRE, retire)
    parent = multiprocessing.parent_process()
    if parent is not None:  # a supervisor that was killed takes its routers along
        loop.add_reader(parent.sentinel, stop.set)
    registry = make_registry(config)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(registry.close)
        router = await stack.enter_async_context(Router(config, registry, limits=Limits(), metrics=metrics))
        await stack.enter_async_context(metrics)
        if parent is not None:
            # Before it accepts: a process that takes the place of another must be able to serve at once.
            await router.wait_for_first_look()
        await router.listen(listener)
        host, port = listener.getsockname()[:2]
        _log.info("router listens on %s:%d", host, port)
        started()
        await stop.wait()
        await router.drain(has_successor=has_successor)
    for number in (*_STOP_SIGNALS, RETIRE):
        loop.remove_signal_handler(number)


def _run_loop(main: Coroutine[Any, Any, None]) -> None:
    gc.freeze()  # modules are for ever: no reason to walk them in each full collection
    gc.set_threshold(*_GC_THRESHOLDS)
    if importlib.util.find_spec("uvloop") is None:
        asyncio.run(main)
    else:
        import uvloop

        uvloop.run(main)


def _allow_many_connections() -> None:
    """Two sockets for each stream: the usual soft limit of 1024 files ends at 500 streams."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
