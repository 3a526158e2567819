"""The launcher with processes that pretend to serve: start, readiness, output, death, nothing left behind."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from diptych.config.disagg import disagg_config
from diptych.errors import StartupError
from diptych.launcher import Supervisor
from diptych.launcher.command import supervise
from diptych.launcher.console import Console
from diptych.listen import open_listener

FAKE = Path(__file__).parents[2] / "fakes" / "fake_member.py"
COMMAND = (sys.executable, str(FAKE))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_DIR", str(tmp_path))
    return tmp_path


class Box:
    def __init__(self, **settings: object) -> None:
        data = {"model": "m", "port": 0, "context_servers": {}, "generation_servers": {}, **settings}
        self.output = io.StringIO()
        self.supervisor = Supervisor(
            disagg_config(data, source="f.yaml"),
            console=Console(["ctx0", "gen0", "router", "up"], stream=self.output),
            command=COMMAND,
        )

    @property
    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that init has not collected yet is gone too.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def pid_of(folder: Path, name: str) -> int:
    return int((folder / f"{name}.pid").read_text())


async def test_starts_all_waits_and_stops_all(folder: Path):
    box = Box(max_batch_size=4, request_timeout_s=9)
    async with box.supervisor as supervisor:
        await supervisor.wait_ready()
        assert supervisor.url is not None
        with urllib.request.urlopen(f"{supervisor.url}/health", timeout=5) as response:
            assert response.status == 200
        pids = [pid_of(folder, name) for name in ("context", "generation", "router")]
        assert all(map(alive, pids))
    assert not any(map(alive, pids))

    arguments, settings = json.loads((folder / "context.args").read_text())
    assert arguments[:2] == ["serve", "m"]
    assert yaml.safe_load(settings) == {"max_batch_size": 4}
    _, settings = json.loads((folder / "router.args").read_text())
    router = disagg_config(yaml.safe_load(settings), source="router.yaml")
    router.require_urls("router.yaml")
    assert router.request_timeout_s == 9
    assert [f"http://{url.removeprefix('http://')}" for url in router.context_servers.urls] == [
        box.supervisor.worker_urls["ctx0"]
    ]
    assert "ctx0   | context starts" in box.lines
    assert "gen0   | loaded" in box.lines
    assert any(line.startswith("up     | ready after") for line in box.lines)


async def test_the_router_gets_its_routing_settings(folder: Path):
    routing = {"type": "kv_cache_aware", "load_weight": 1.0}
    conditional = {"max_local_prefill_length": 7}
    box = Box(generation_servers={"router": routing}, conditional_disagg_config=conditional)
    async with box.supervisor as supervisor:
        await supervisor.wait_ready()
        _, text = json.loads((folder / "router.args").read_text())
    settings = yaml.safe_load(text)
    assert settings["generation_servers"]["router"] == routing
    assert settings["conditional_disagg_config"] == conditional


async def test_without_router(folder: Path):
    data = {"model": "m", "context_servers": {}, "generation_servers": {}}
    supervisor = Supervisor(
        disagg_config(data, source="f.yaml"),
        with_router=False,
        console=Console([], stream=io.StringIO()),
        command=COMMAND,
    )
    async with supervisor:
        await supervisor.wait_ready()
    assert supervisor.url is None
    assert not (folder / "router.args").exists()


async def test_a_process_that_fails_to_start_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_DIE", "generation")
    box = Box()
    assert await supervise(box.supervisor) == 1
    said = "\n".join(box.lines)
    assert "gen0 exited with code 3; stopping everything. Its last lines:" in said
    assert "up     |     error: no such model" in said
    assert "ready after" not in said


async def test_a_process_that_dies_later_ends_the_rest(folder: Path):
    box = Box()
    running = asyncio.create_task(supervise(box.supervisor))
    await until(lambda: any("press Ctrl-C" in line for line in box.lines))
    pids = {name: pid_of(folder, name) for name in ("context", "generation", "router")}
    os.kill(pids["context"], signal.SIGKILL)
    assert await running == 1
    assert "ctx0 was killed by SIGKILL" in box.output.getvalue()
    assert not any(map(alive, pids.values()))


async def test_one_signal_stops_all(folder: Path):
    box = Box()
    running = asyncio.create_task(supervise(box.supervisor))
    await until(lambda: any("press Ctrl-C" in line for line in box.lines))
    pids = [pid_of(folder, name) for name in ("context", "generation", "router")]
    os.kill(os.getpid(), signal.SIGINT)
    assert await running == 0
    assert not any(map(alive, pids))


async def test_a_stubborn_process_is_killed_with_its_children(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_STUBBORN", "context")
    box = Box()
    running = asyncio.create_task(supervise(box.supervisor))
    await until(lambda: any("press Ctrl-C" in line for line in box.lines))
    pids = [pid_of(folder, "context"), pid_of(folder, "grandchild")]
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: any("stopping" in line for line in box.lines))
    os.kill(os.getpid(), signal.SIGTERM)  # the second one does not wait for the grace period
    assert await asyncio.wait_for(running, 8) == 0
    assert not any(map(alive, pids))


async def test_start_has_a_deadline(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_NEVER_READY", "generation")
    box = Box(server_start_timeout_s=0.5)
    with pytest.raises(StartupError, match=r"gen0 was not ready within 0\.5 s"):
        await supervise(box.supervisor)
    assert all(not alive(int(file.read_text())) for file in folder.glob("*.pid"))


async def test_port_in_use_before_anything_starts(folder: Path):
    with open_listener("localhost", 0) as other:
        port = other.getsockname()[1]
        box = Box(generation_servers={"urls": [f"localhost:{port}"]})
        with pytest.raises(StartupError, match=f"localhost:{port}: the port is in use"):
            await supervise(box.supervisor)
    assert not list(folder.glob("*.args"))


async def test_children_die_when_the_launcher_is_killed(folder: Path):
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from diptych.config.disagg import disagg_config\n"
            "import asyncio; from diptych.launcher import Supervisor\n"
            "from diptych.launcher.command import supervise\n"
            "data = {'model': 'm', 'port': 0, 'context_servers': {}, 'generation_servers': {}}\n"
            "box = Supervisor(disagg_config(data, source='f'), command=(sys.executable, sys.argv[1]))\n"
            "asyncio.run(supervise(box))\n",
            str(FAKE),
        ],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(folder)},  # it cannot clean up after itself
    )
    try:
        names = ("context", "generation", "router")
        await until(lambda: all((folder / f"{name}.pid").exists() for name in names))
        await until(lambda: all((folder / f"{name}.pid").read_text() for name in names))
    finally:
        launcher.kill()
        launcher.wait(timeout=10)
    pids = [pid_of(folder, name) for name in names]
    await until(lambda: not any(map(alive, pids)))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_names_are_coloured_on_a_terminal_only():
    plain, terminal = io.StringIO(), _Terminal()
    Console(["a", "long"], stream=plain).show("a", "text")
    Console(["a", "long"], stream=terminal).show("a", "text")
    assert plain.getvalue() == "a    | text\n"
    assert terminal.getvalue() == "\x1b[36ma    |\x1b[0m text\n"
