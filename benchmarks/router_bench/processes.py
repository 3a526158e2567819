"""Processes of the benchmark: built, started, measured, stopped. Knows nothing of routers."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

_START_S = 30.0
_STOP_S = 15.0


def build(source: Path, folder: Path) -> Path:
    program = folder / source.stem
    subprocess.run(["gcc", "-O2", "-Wall", "-o", str(program), str(source)], check=True, timeout=120)
    return program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Process:
    """Use as ``with``: running and answering GET `path` inside, gone after it."""

    def __init__(
        self,
        command: list[str],
        *,
        port: int,
        log: Path,
        path: str = "/health",
        environment: dict[str, str],
        start_s: float = _START_S,
    ) -> None:
        self._command = command
        self._port = port
        self._log = log
        self._path = path
        self._environment = {**os.environ, **environment}
        self._start_s = start_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Process":
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def cpu_s(self) -> float:
        """CPU time of the process and its descendants so far."""
        assert self._process is not None
        return sum(_cpu_s(pid) for pid in _tree(self._process.pid))

    def memory_mb(self) -> float:
        assert self._process is not None
        return sum(_resident_kb(pid) for pid in _tree(self._process.pid)) / 1024

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{self._path}", timeout=2):
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.05)
        tail = self._log.read_text(errors="replace")[-2000:]
        raise RuntimeError(
            f"{self._command[0]} did not start within {self._start_s:g} s; its log ends: {tail}"
        )

    def _stop(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def _tree(pid: int) -> list[int]:
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        for task in Path(f"/proc/{found[-1]}/task").glob("*"):
            try:
                left += [int(child) for child in (task / "children").read_text().split()]
            except OSError:
                continue
    return found


def _cpu_s(pid: int) -> float:
    """By the process's own clock: what /proc/PID/stat says is rounded to ten milliseconds, a hundred lone events."""
    clock = (~pid << 3) | 2  # what clock_getcpuclockid(3) makes of a pid
    try:
        return time.clock_gettime(clock)
    except OSError:
        return 0.0


def _resident_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
