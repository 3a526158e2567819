"""The HTTP process's side of its engine: starts the process, sends sequences, hands each one its events.

When the engine dies, every open sequence gets one error event, and `died` completes. One that hangs too long is killed.
"""

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from diptych.errors import ModelLoadError, StartupError
from diptych.wire import (
    Abort,
    BlockChanges,
    EngineFailed,
    EngineOutput,
    EngineProgress,
    EngineReady,
    EngineStats,
    Ping,
    Pong,
    Release,
    Shutdown,
    Submit,
    ToEngine,
    TokenEvent,
    WatchBlocks,
)
from diptych.worker.link import decode_from_engine, encode
from diptych.worker.pulse import Pulse
from diptych.worker.settings import EngineSettings

log = logging.getLogger(__name__)

_SHUTDOWN_S = 5.0
_STARTUP_SILENCE_S = 600.0


# Where a sequence's events go: called on the event loop, must not block.
EventSink = Callable[[TokenEvent], None]


class EngineClient:
    def __init__(self, settings: EngineSettings, *, hang_timeout_s: float) -> None:
        self._settings = settings
        self._hang_timeout_s = hang_timeout_s
        self._pulse = Pulse(lambda: self._send(Ping()))
        self._endpoint = f"ipc://@diptych-{os.getpid()}-{secrets.token_hex(4)}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._sinks: dict[str, EventSink] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._process: asyncio.subprocess.Process | None = None
        self.ready: EngineReady | None = None
        self.stats = EngineStats()
        self.on_iteration: Callable[[EngineStats], None] | None = None
        self.on_blocks: Callable[[BlockChanges], None] | None = None
        self.died: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def is_alive(self) -> bool:
        return self.ready is not None and not self.died.done()

    @property
    def silent_s(self) -> float:
        """For how long its step loop has not turned."""
        return self._pulse.silent_s

    async def start(self, progress: Callable[[EngineProgress], None]) -> EngineReady:
        """Start the process and wait until it can take sequences. StartupError when it cannot."""
        self._socket.bind(self._endpoint)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "diptych.worker.engine_process",
            self._endpoint,
            stdin=asyncio.subprocess.PIPE,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.msgpack.encode(self._settings))
        self._process.stdin.close()
        self._tasks.append(asyncio.create_task(self._watch(self._process)))
        self.ready = await self._wait_ready(progress)
        self._tasks.append(asyncio.create_task(self._dispatch()))
        self._tasks.append(asyncio.create_task(self._kill_when_it_hangs(self._process)))
        return self.ready

    def submit(self, request: Submit, sink: EventSink) -> None:
        """Run one sequence; its events go to `sink`, the last one carries `finish_reason` or `ticket`."""
        self._sinks[request.request_id] = sink
        if self.died.done():
            self._fail(request.request_id)
            return
        self._send(request)

    def abort(self, request_id: str) -> None:
        """Stop caring about a sequence: no more events reach its sink."""
        if self._sinks.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    def release(self, ticket_id: str) -> None:
        self._send(Release(ticket_id))

    def watch_blocks(self, *, enabled: bool, with_tokens: bool = False) -> None:
        """What enters and leaves the prefix cache goes to `on_blocks`, or no longer does."""
        self._send(WatchBlocks(enabled=enabled, with_tokens=with_tokens))

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._send(Shutdown())
            try:
                await asyncio.wait_for(self._process.wait(), _SHUTDOWN_S)
            except asyncio.TimeoutError:
                log.warning("the engine process did not stop within %g s: killing it", _SHUTDOWN_S)
                self._process.kill()
                await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()

    async def _wait_ready(self, progress: Callable[[EngineProgress], None]) -> EngineReady:
        while True:
            receive = asyncio.ensure_future(self._socket.recv())
            waits: set[asyncio.Future[Any]] = {receive, self.died}
            await asyncio.wait(waits, timeout=_STARTUP_SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not receive.done():
                receive.cancel()
                if self.died.done():
                    raise StartupError(
                        f"the engine process ended while starting (exit code {self.died.result()})"
                    )
                raise StartupError(
                    f"the engine process said nothing for {_STARTUP_SILENCE_S:g} s while starting"
                )
            match decode_from_engine(receive.result()):
                case EngineReady() as ready:
                    return ready
                case EngineFailed() as failed:
                    raise ModelLoadError(failed.message)
                case EngineProgress() as message:
                    progress(message)

    async def _dispatch(self) -> None:
        while True:
            message = decode_from_engine(await self._socket.recv())
            if isinstance(message, Pong):
                self._pulse.answered()
            if not isinstance(message, EngineOutput):
                continue
            if message.stats is not None:
                self.stats = message.stats
                if message.stats.iteration is not None and self.on_iteration is not None:
                    self.on_iteration(message.stats)
            if message.blocks is not None and self.on_blocks is not None:
                self.on_blocks(message.blocks)
            for event in message.events:
                self._deliver(event)

    def _deliver(self, event: TokenEvent) -> None:
        terminal = event.finish_reason is not None or event.ticket is not None
        sink = self._sinks.pop(event.request_id, None) if terminal else self._sinks.get(event.request_id)
        if sink is not None:
            sink(event)
        elif event.ticket_id is not None:
            self.release(event.ticket_id)  # nobody waits for it any more

    async def _kill_when_it_hangs(self, process: asyncio.subprocess.Process) -> None:
        silent_s = await self._pulse.run(self._hang_timeout_s)
        if process.returncode is None:
            log.critical("the engine process has hung for %.0f s: killing it", silent_s)
            process.kill()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        self.died.set_result(code)
        if self._sinks:
            log.error("the engine process ended (exit code %d) with %d open requests", code, len(self._sinks))
        for request_id in list(self._sinks):
            self._fail(request_id)

    def _fail(self, request_id: str) -> None:
        event = TokenEvent(
            request_id=request_id,
            finish_reason="error",
            error="the worker's engine process ended",
            error_status=503,
        )
        self._deliver(event)

    def _send(self, message: ToEngine) -> None:
        if not self.died.done():
            # A PAIR socket without a high-water mark takes every message at once: nothing to wait for.
            self._socket.send(encode(message))
