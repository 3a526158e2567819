"""Workers and routers for a benchmark to measure: `trtllm-serve` processes on free ports of this host."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from router_bench.processes import Process, free_port

_START_S = 300.0


class Mesh:
    """`urls` by name, of all that were started. Use as ``with``: they end with it, and an error shows their logs."""

    def __init__(self, folder: Path) -> None:
        self.urls: dict[str, str] = {}
        self._stack = ExitStack()
        self._folder = folder

    def __enter__(self) -> "Mesh":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is not None:
                self._show_logs()

    def worker(
        self, name: str, model: str, role: str | None, settings: dict[str, Any], gpu: int | None
    ) -> None:
        """`gpu`: which of those that this process sees; None: whatever the worker finds."""
        environment = {}
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        port = free_port()
        command = ["serve", model, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--config", self._write(name, settings)]
        command += [] if role is None else ["--server_role", role]
        self._start(name, command, port, environment)

    def router(self, name: str, **settings: Any) -> None:
        """In front of the workers called `context` and `generation`."""
        port = free_port()
        servers = {
            f"{role}_servers": {"urls": [self.urls[role].removeprefix("http://")]}
            for role in ("context", "generation")
        }
        config = self._write(name, {"hostname": "127.0.0.1", "port": port, **settings, **servers})
        self._start(name, ["disaggregated", "-c", config], port, {})

    def _show_logs(self) -> None:
        """The end of each, to stderr."""
        for log in sorted(self._folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)

    def _write(self, name: str, settings: dict[str, Any]) -> str:
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    def _start(self, name: str, arguments: list[str], port: int, environment: dict[str, str]) -> None:
        process = Process(
            [sys.executable, "-m", "diptych.cli", *arguments],
            port=port,
            log=self._folder / f"{name}.log",
            environment={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
            start_s=_START_S,
        )
        self._stack.enter_context(process)
        self.urls[name] = f"http://127.0.0.1:{port}"
