"""The launcher as a command: until a signal, until a process dies, or until the caller's own work is done."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

from diptych.config import DisaggConfig
from diptych.launcher.child import Child
from diptych.launcher.supervisor import ChildDied, Supervisor

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

WhenReady = Callable[[Supervisor], Awaitable[int | None]]


def run(
    config: DisaggConfig,
    *,
    with_router: bool = True,
    log_level: str = "info",
    when_ready: WhenReady | None = None,
) -> int:
    """Until Ctrl-C (0) or until a process dies (1). `when_ready` may end it with its own exit code."""
    supervisor = Supervisor(config, with_router=with_router, log_level=log_level)
    return asyncio.run(supervise(supervisor, when_ready))


async def supervise(supervisor: Supervisor, when_ready: WhenReady | None = None) -> int:
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(_work(supervisor, when_ready))
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            supervisor.say("stopping")
            work.cancel()
        else:
            supervisor.kill()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        return await work
    except asyncio.CancelledError:
        return 0
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)


async def _work(supervisor: Supervisor, when_ready: WhenReady | None) -> int:
    async with supervisor:
        try:
            await supervisor.wait_ready()
            if when_ready is None:
                supervisor.say("press Ctrl-C to stop")
                await supervisor.watch()
            else:
                return await _until_death(supervisor, when_ready)
        except ChildDied as death:
            _report(supervisor, death.child)
            return 1
    return 0


async def _until_death(supervisor: Supervisor, when_ready: WhenReady) -> int:
    """Runs `when_ready`, and when that leaves no exit code, goes on until a process dies."""
    watch = asyncio.create_task(supervisor.watch())
    ready = asyncio.ensure_future(when_ready(supervisor))
    try:
        await asyncio.wait({watch, ready}, return_when=asyncio.FIRST_COMPLETED)
        if not watch.done():
            code = await ready
            if code is not None:
                return code
        await watch
    finally:
        for task in (watch, ready):
            task.cancel()
        await asyncio.gather(watch, ready, return_exceptions=True)
    raise AssertionError("watch() returns only by raising")


def _report(supervisor: Supervisor, child: Child) -> None:
    code = child.returncode
    how = (
        f"was killed by {signal.Signals(-code).name}"
        if code is not None and code < 0
        else f"exited with code {code}"
    )
    supervisor.say(f"{child.name} {how}; stopping everything. Its last lines:")
    for line in list(child.last_lines):
        supervisor.say(f"    {line}")
