"""Runs the members of a plan: start, wait until ready, repeat output, and stop everything when one ends.

Every listening socket is opened here and inherited by its process: a port in use shows before anything
starts, and no port can be lost between choosing and binding it.
"""

import asyncio
import contextlib
import dataclasses
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diptych.config import DisaggConfig
from diptych.errors import StartupError
from diptych.launcher.child import COMMAND, Child
from diptych.launcher.console import Console
from diptych.launcher.gpus import VARIABLE, assign, visible_gpus
from diptych.launcher.plan import Member, members
from diptych.launcher.readiness import wait_healthy
from diptych.listen import open_listener

_NAME = "up"
_GRACE_S = 10.0


class ChildDied(Exception):
    def __init__(self, child: Child) -> None:
        super().__init__(child.name)
        self.child = child


class Supervisor:
    """Use as `async with`; leaving it stops every process."""

    def __init__(
        self,
        config: DisaggConfig,
        *,
        with_router: bool = True,
        log_level: str = "info",
        console: Console | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.config = config
        self.members = members(config)
        self._gpus = _gpus_of(self.members)
        names = [member.name for member in self.members]
        self.console = console or Console([*names, "router", _NAME])
        self.url: str | None = None  # the router's, for people
        self.worker_urls: dict[str, str] = {}
        self._with_router = with_router
        self._command = command
        self._log_level = log_level
        self._workers: list[Child] = []
        self._router: Child | None = None
        self._router_listener: socket.socket | None = None
        self._folder = Path()
        self._files = contextlib.ExitStack()

    async def __aenter__(self) -> "Supervisor":
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def wait_ready(self) -> None:
        """Until every health check is 200; ChildDied when a process ends, StartupError at the deadline.

        The router comes last: it then finds its workers ready at its first look.
        """
        began = time.monotonic()
        await self._wait_healthy(self.worker_urls)
        if self._router_listener is not None:
            url = await self._start_router(self._router_listener)
            await self._wait_healthy({"router": url})
        self.say(f"ready after {time.monotonic() - began:.1f} s" + (f": {self.url}" if self.url else ""))

    async def watch(self) -> None:
        """Returns never: raises ChildDied when a process ends."""
        raise ChildDied(await self._first_death())

    async def stop(self) -> None:
        """The router first, so that running requests can end; then the workers, all at once."""
        if self._router is not None:
            await self._router.stop(grace_s=_GRACE_S)
        await asyncio.gather(*(worker.stop(grace_s=_GRACE_S) for worker in self._workers))
        self._files.close()

    def kill(self) -> None:
        for child in self._children():
            child.kill()

    def say(self, line: str) -> None:
        self.console.show(_NAME, line)

    def _children(self) -> list[Child]:
        return [*self._workers, *([self._router] if self._router else [])]

    async def _start(self) -> None:
        self._folder = Path(self._files.enter_context(tempfile.TemporaryDirectory(prefix="diptych-up-")))
        if self._with_router:
            listener = open_listener(self.config.hostname, self.config.port)
            self._router_listener = self._files.enter_context(listener)
        with contextlib.ExitStack() as sockets:
            listeners = [sockets.enter_context(open_listener(m.host, m.port)) for m in self.members]
            for member, listener in zip(self.members, listeners, strict=True):
                self._workers.append(await self._start_worker(member, listener))

    async def _start_worker(self, member: Member, listener: socket.socket) -> Child:
        port = listener.getsockname()[1]
        self.worker_urls[member.name] = f"http://{_authority(member.host, port)}"
        file = self._folder / f"{member.name}.yaml"
        file.write_text(yaml.safe_dump(_plain(member.options)), encoding="utf-8")
        arguments = [
            *("serve", member.model, "--host", member.host, "--port", str(port)),
            *("--listen_fd", str(listener.fileno()), "--server_role", member.role),
            *("--config", str(file), "--log_level", self._log_level),
        ]
        gpus = ",".join(self._gpus.get(member.name, []))
        self.say(
            f"starting {member.name} on {_authority(member.host, port)}" + (f", GPU {gpus}" if gpus else "")
        )
        return await self._start_child(member.name, arguments, listener, {VARIABLE: gpus} if gpus else {})

    async def _start_router(self, listener: socket.socket) -> str:
        port = listener.getsockname()[1]
        host = "localhost" if self.config.hostname in ("0.0.0.0", "::") else self.config.hostname
        self.url = f"http://{_authority(host, port)}"
        file = self._folder / "router.yaml"
        file.write_text(yaml.safe_dump(self._router_settings(port)), encoding="utf-8")
        arguments = ["disaggregated", "-c", str(file), "--listen_fd", str(listener.fileno())]
        arguments += ["--log_level", self._log_level]
        self.say(f"starting router on {_authority(self.config.hostname, port)}")
        self._router = await self._start_child("router", arguments, listener)
        listener.close()  # the process has its own copy
        return self.url

    async def _start_child(
        self,
        name: str,
        arguments: Sequence[str],
        listener: socket.socket,
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        return await Child.start(
            name,
            [*self._command, *arguments],
            pass_fds=[listener.fileno()],
            show=self.console.show,
            environment=environment,
        )

    def _router_settings(self, port: int) -> dict[str, Any]:
        """The configuration as it was read, with the urls that the workers got."""
        skipped = {"context_servers", "generation_servers", "listen_fd", "metadata_server", "disagg_cluster"}
        settings: dict[str, Any] = {}
        for setting in dataclasses.fields(DisaggConfig):
            value = getattr(self.config, setting.name)
            if setting.name not in skipped and value is not None:
                settings[setting.name] = _plain(value)
        settings["port"] = port
        for role, section, key in (
            ("CONTEXT", self.config.context_servers, "context_servers"),
            ("GENERATION", self.config.generation_servers, "generation_servers"),
        ):
            urls = [self.worker_urls[member.name] for member in self.members if member.role in (role, "BOTH")]
            router = {"type": section.router.type, **_plain(section.router.options)}
            settings[key] = {"urls": urls, "router": router}
        return settings

    async def _wait_healthy(self, urls: Mapping[str, str]) -> None:
        checks = [asyncio.create_task(self._check(name, url)) for name, url in urls.items()]
        death = asyncio.create_task(self._first_death())
        try:
            pending: set[asyncio.Task[Any]] = {death, *checks}
            while death in pending and len(pending) > 1:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if death in done:
                    raise ChildDied(death.result())
                for check in done:
                    await check  # raises what it found
        finally:
            for task in (death, *checks):
                task.cancel()
            await asyncio.gather(death, *checks, return_exceptions=True)

    async def _check(self, name: str, url: str) -> None:
        timeout_s = self.config.server_start_timeout_s

        def waiting(elapsed_s: float) -> None:
            self.say(f"waiting for {name}, {elapsed_s:.0f} s")

        if not await wait_healthy(url, timeout_s=timeout_s, waiting=waiting):
            raise StartupError(f"{name} was not ready within {timeout_s:g} s; see its output above")

    async def _first_death(self) -> Child:
        """The first process that ends; nobody asked any of them to."""
        children = {asyncio.create_task(child.wait()): child for child in self._children()}
        try:
            done, _ = await asyncio.wait(children, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in children:
                task.cancel()
        child = children[done.pop()]
        await child.drain(timeout_s=1.0)
        return child


def _gpus_of(workers: Sequence[Member]) -> dict[str, list[str]]:
    """By the worker's name; empty where there is no GPU."""
    gpus = visible_gpus(os.environ)
    return assign({worker.name: worker.num_gpus for worker in workers}, gpus) if gpus else {}


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _plain(value: Any) -> Any:
    """Mappings, sections and sequences as the dict and list that YAML writes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
