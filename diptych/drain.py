"""Tells one worker from outside to leave: no new requests, what runs ends, then its process does."""

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

from diptych.config import DisaggCluster, MetadataConfig
from diptych.discovery import Registry
from diptych.discovery.address import parse_address
from diptych.discovery.connect import member_registry
from diptych.errors import ConfigError, StartupError
from diptych.trust import ClusterTrust
from diptych.wire import WorkerInfo

_CALL_S = 10.0


def run(
    worker: str, metadata: MetadataConfig | None, cluster: DisaggCluster | None, trust: ClusterTrust
) -> str:
    """`worker`: its address, or its id when a registry is given. Returns what to tell the user."""
    return asyncio.run(_drain(worker, metadata, cluster, trust))


async def _drain(
    worker: str, metadata: MetadataConfig | None, cluster: DisaggCluster | None, trust: ClusterTrust
) -> str:
    url = _address(worker)
    if url is None:
        registry = member_registry(metadata, cluster, trust)
        if registry is None:
            raise ConfigError(
                f"{worker!r} is not an address such as localhost:8001; to name a worker by its id, say where "
                "it is registered with --metadata_server_config_file or --disagg_cluster_uri"
            )
        try:
            url = (await _find(worker, registry)).url
        finally:
            await registry.close()
    answer = await _post(f"{url}/drain", trust.headers())
    return (
        f"{url} drains: {answer.get('open_requests', '?')} open requests, "
        f"{answer.get('held_blocks', '?')} blocks held for other workers"
    )


def _address(worker: str) -> str | None:
    try:
        return parse_address(worker).url
    except ConfigError:
        return None


async def _find(worker_id: str, registry: Registry) -> WorkerInfo:
    try:
        snapshot = await asyncio.wait_for(_first(registry), _CALL_S)
    except asyncio.TimeoutError:
        raise StartupError(f"the registry did not answer within {_CALL_S:g} s") from None
    for info in snapshot:
        if info.worker_id == worker_id:
            return info
    known = ", ".join(info.worker_id for info in snapshot) or "none"
    raise StartupError(f"no worker {worker_id!r} is registered; there is: {known}")


async def _first(registry: Registry) -> tuple[WorkerInfo, ...]:
    async for snapshot in registry.watch():
        return snapshot
    return ()


async def _post(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_CALL_S)) as session,
            session.post(url, headers=headers) as response,
        ):
            body, status = await response.read(), response.status
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        raise StartupError(f"{url} cannot be reached: {error or type(error).__name__}") from None
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = {}
    if status != 202 or not isinstance(answer, dict):
        message = answer.get("error", {}).get("message") if isinstance(answer, dict) else None
        raise StartupError(f"{url} answers {status}: {message or 'it is not a worker of this version'}")
    return answer
