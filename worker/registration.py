"""Keeps the registry's picture of this worker true, from the moment its port answers until it has drained.

STARTING while the model loads, READY, DRAINING; the load is told at most once a second. A worker that
somebody took out of the registry drains. Knows nothing of etcd or of routers.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from diptych.discovery import Lease
from diptych.discovery.address import Address
from diptych.discovery.connect import member_registry, registry_endpoint
from diptych.wire import WorkerInfo
from diptych.worker.service import WorkerService

log = logging.getLogger(__name__)

_LOAD_INTERVAL_S = 1.0
_WILDCARDS = ("", "0.0.0.0", "::", "*")
_ELSEWHERE = "192.0.2.1"  # never sent to: only the route to it matters


@asynccontextmanager
async def registered(service: WorkerService) -> AsyncIterator[None]:
    """Inside, the worker is in the registry that its configuration names, if it names one."""
    config = service.config
    registry = member_registry(config.metadata_server, config.disagg_cluster, service.trust)
    endpoint = registry_endpoint(config.metadata_server, config.disagg_cluster)
    if registry is None or endpoint is None:
        yield
        return
    url = announced_url(config.host, config.port, endpoint)
    try:
        lease = await registry.register(_info(service, url))
        log.info("registered as %s at %s", url, endpoint)
        following = asyncio.create_task(_follow(service, lease, url), name="registration")
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await lease.close()
    finally:
        await registry.close()


def announced_url(host: str, port: int, endpoint: str) -> str:
    """Where others reach us. A wildcard becomes the address that our packets to the registry have."""
    return Address(_outgoing_address(endpoint) if host in _WILDCARDS else host, port).url


async def _follow(service: WorkerService, lease: Lease, url: str) -> None:
    removed = asyncio.ensure_future(lease.removed.wait())
    told = _info(service, url)
    await lease.update(told)
    try:
        while True:
            changed = asyncio.ensure_future(service.changed.wait())
            try:
                waits = {changed, removed} if not removed.done() else {changed}
                await asyncio.wait(waits, timeout=_LOAD_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            service.changed.clear()
            if removed.done():
                service.request_drain("it was taken out of the registry")
            info = _info(service, url)
            if info != told:
                told = info
                await lease.update(info)
    finally:
        removed.cancel()


def _info(service: WorkerService, url: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=service.worker_id,
        url=url,
        role=service.role,
        model=service.config.model_name,
        incarnation=service.incarnation,
        state=service.state,
        layout=service.layout,
        load=service.load,
    )


def _outgoing_address(endpoint: str) -> str:
    """Of the interface that leads to the registry; when that is on this machine, of the default route."""
    for host in (urlsplit(endpoint).hostname or _ELSEWHERE, _ELSEWHERE):
        try:
            found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
            with socket.socket(found[0][0], socket.SOCK_DGRAM) as probe:
                probe.connect(found[0][4])  # UDP: nothing is sent
                address = str(probe.getsockname()[0])
        except OSError:
            continue
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return address
    return "127.0.0.1"
