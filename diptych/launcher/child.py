"""One process of the launcher: start it, show its output under its name, keep the last lines, stop it."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

COMMAND = (sys.executable, "-m", "diptych.cli")  # trtllm-serve, whether or not it is on PATH

_LAST_LINES = 20
_MAX_LINE = 16 * 1024
_CHUNK = 64 * 1024

Print = Callable[[str, str], None]  # name, line


class Child:
    """A process in its own session: the terminal's signals reach only the launcher, which stops all."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, show: Print) -> None:
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._process = process
        self._show = show
        self._output = asyncio.create_task(self._repeat_output(), name=f"output of {name}")

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int],
        show: Print,
        environment: Mapping[str, str] | None = None,
    ) -> "Child":
        """`environment`: variables that differ from ours."""
        ours = {"PYTHONUNBUFFERED": "1", "DIPTYCH_PARENT_PID": str(os.getpid())}
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
            env={**os.environ, **ours, **(environment or {})},
        )
        return cls(name, process, show)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, *, grace_s: float) -> None:
        """SIGTERM to the process, which ends its own children; after `grace_s` SIGKILL to its whole group."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        self.kill()
        await self._process.wait()
        await self.drain(timeout_s=1.0)

    def kill(self) -> None:
        """SIGKILL to the whole process group; harmless when all of it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def drain(self, *, timeout_s: float) -> None:
        """Wait for the last output; bounded, because a grandchild may still hold the pipe."""
        await asyncio.wait({self._output}, timeout=timeout_s)
        if not self._output.done():
            self._output.cancel()
            await asyncio.wait({self._output})

    async def _repeat_output(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        rest = b""
        while chunk := await stream.read(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._line(line)
            if len(rest) > _MAX_LINE:
                self._line(rest)
                rest = b""
        if rest:
            self._line(rest)

    def _line(self, raw: bytes) -> None:
        # Of a progress line that rewrites itself only the last state is worth keeping.
        text = raw.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2].rstrip()
        if text:
            self.last_lines.append(text)
            self._show(self.name, text)
