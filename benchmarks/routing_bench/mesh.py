"""Workers and routers as a user starts them, on free ports of this host."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

_START_S = 300.0
_STOP_S = 60.0


class Mesh:
    """Use as ``with``: leaving stops everything."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Mesh":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def worker(self, name: str, model: str, role: str, options: dict[str, Any]) -> str:
        """Its address, host:port; it is not ready yet."""
        port = _free_port()
        config = self._write(name, options)
        self._start(
            name,
            "serve",
            model,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--server_role",
            role,
            "--config",
            config,
        )
        return f"127.0.0.1:{port}"

    def router(self, name: str, options: dict[str, Any]) -> str:
        port = _free_port()
        config = self._write(name, {"hostname": "127.0.0.1", "port": port, "log_level": "warning", **options})
        self._start(name, "disaggregated", "-c", config)
        return f"127.0.0.1:{port}"

    def wait_ready(self, *addresses: str) -> None:
        deadline = time.monotonic() + _START_S
        for address in addresses:
            while not _answers(f"http://{address}/health"):
                ended = [process.args for process in self._processes if process.poll() is not None]
                if ended or time.monotonic() > deadline:
                    raise SystemExit(f"{address} is not ready; logs are in {self._folder}; ended: {ended}")
                time.sleep(0.1)

    def _write(self, name: str, options: dict[str, Any]) -> str:
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(options), encoding="utf-8")
        return str(path)

    def _start(self, name: str, *arguments: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", "diptych.cli", *arguments]
            self._processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False
