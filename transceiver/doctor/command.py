"""The command behind `trtllm-serve doctor`: what a worker would find on this host, and the way to a peer."""

import asyncio
import importlib.util
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import click
import orjson

from diptych.config import MetadataConfig
from diptych.discovery.address import parse_address
from diptych.discovery.connect import member_registry
from diptych.errors import DiptychError
from diptych.transceiver import packages
from diptych.transceiver.doctor.finding import Finding, can_serve, table, to_json
from diptych.transceiver.doctor.gpus import gpus, has_driver
from diptych.transceiver.doctor.limits import limits
from diptych.transceiver.doctor.versions import versions
from diptych.transceiver.host_limits import HostLimits
from diptych.trust import ClusterTrust

if TYPE_CHECKING:
    from diptych.transceiver.doctor.links import Way

_POOL_BYTES = 512 << 20  # what a CPU worker takes when nothing says otherwise
_ASK_S = 5.0
_PEER_S, _RETRY_S = 20.0, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    peer: str | None = None  # HOST:PORT of a worker, or of a doctor that listens
    metadata: MetadataConfig | None = None
    as_json: bool = False


def run(settings: DoctorSettings) -> int:
    """The exit code: 0 when a worker could serve here and the peer, if one was named, can be reached."""
    findings = list(_examine(settings))
    click.echo(
        orjson.dumps(to_json(findings), option=orjson.OPT_INDENT_2) if settings.as_json else _page(findings)
    )
    return 0 if can_serve(findings) else 1


def listen(host: str, port: int) -> None:
    """Until Ctrl-C."""
    from diptych.transceiver.doctor.listen import serve

    with serve(host, port) as server:
        click.echo(
            f"Listening on {host}:{server.server_address[1]} for: trtllm-serve doctor --peer THIS_HOST:PORT"
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("")


def _examine(settings: DoctorSettings) -> Iterator[Finding]:
    with ExitStack() as stack:
        ways = stack.enter_context(_local_ways())
        yield from versions()
        yield from gpus()
        installed = [name for name in packages.OPTIONAL if packages.missing_package(name) is None]
        yield from limits(HostLimits.read(), installed, _POOL_BYTES)
        if settings.metadata is not None:
            yield asyncio.run(_etcd(settings.metadata))
        if ways is None:
            yield Finding(section="links here", name="", status="none", detail="not measured: needs xxhash")
            return
        found = [way.measure() for way in ways]
    yield from _with_verdict(found, "links here", "", "no transport works")
    if settings.peer is not None:
        yield from _peer(settings.peer)


@contextmanager
def _local_ways() -> "Iterator[list[Way] | None]":
    if importlib.util.find_spec("xxhash") is None:
        yield None
        return
    from diptych.transceiver.doctor.links import local_ways

    with local_ways(["cpu", "cuda"] if has_driver() else ["cpu"]) as ways:
        yield ways


def _peer(peer: str) -> Iterator[Finding]:
    from diptych.transceiver.doctor.links import peer_ways
    from diptych.transceiver.ticket import decode_rank

    try:
        description = _describe(peer)
        names = list(decode_rank(description).transports)
    except (DiptychError, OSError) as error:
        yield Finding(section="links to peer", name=peer, status="fails", detail=str(error))
        return
    with peer_ways(description, names) as ways:
        found = [way.measure() for way in ways]
    yield from _with_verdict(found, "links to peer", peer, "no transport reaches it")


def _with_verdict(found: list[Finding], section: str, name: str, failure: str) -> Iterator[Finding]:
    yield from found
    if not any(finding.gb_s for finding in found):
        yield Finding(section=section, name=name, status="fails", detail=failure)


def _describe(peer: str) -> bytes:
    """Tries for a while: a doctor that listens, or a worker, may be starting."""
    url, headers = f"{parse_address(peer).url}/kv/peer", ClusterTrust(None).headers()
    deadline = time.monotonic() + _PEER_S
    while True:
        try:
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request, timeout=_PEER_S) as response:
                body: bytes = response.read()
            return body
        except OSError as error:
            starting = (
                not isinstance(error, urllib.error.HTTPError) or error.code == HTTPStatus.SERVICE_UNAVAILABLE
            )
            if not starting or time.monotonic() + _RETRY_S > deadline:
                raise
        time.sleep(_RETRY_S)


async def _etcd(metadata: MetadataConfig) -> Finding:
    name = ", ".join(metadata.urls)
    registry = member_registry(metadata, None, ClusterTrust(None))
    assert registry is not None
    try:
        workers = await asyncio.wait_for(anext(registry.watch()), _ASK_S)
    except (DiptychError, OSError, asyncio.TimeoutError) as error:
        reason = str(error) or f"no answer within {_ASK_S:g} s"
        return Finding(
            section="etcd",
            name=name,
            status="fails",
            detail=reason,
            remedy="start it, or correct hostname and port",
        )
    finally:
        await registry.close()
    return Finding(section="etcd", name=name, detail=f"{len(workers)} workers are registered")


def _page(findings: list[Finding]) -> str:
    verdict = "A worker can serve here." if can_serve(findings) else "Not as it is: see what fails."
    return f"{table(findings)}\n\n{verdict}"
