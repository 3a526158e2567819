"""What a worker announces, and when it drains; without an engine."""

import asyncio
from pathlib import Path

import pytest

from diptych.config import DisaggCluster, LlmConfig
from diptych.worker.registration import announced_url, registered
from diptych.worker.service import WorkerService
from tests.diptych.discovery.conftest import EmbeddedWorld


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("localhost", "http://localhost:8001"),
        ("127.0.0.1", "http://127.0.0.1:8001"),
        ("10.1.2.3", "http://10.1.2.3:8001"),
        ("::1", "http://[::1]:8001"),
        ("node-7.internal", "http://node-7.internal:8001"),
    ],
)
def test_a_host_is_announced_as_it_is(host: str, url: str):
    assert announced_url(host, 8001, "http://etcd:2379") == url


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_wildcard_is_announced_as_an_address(host: str):
    url = announced_url(host, 8001, "http://127.0.0.1:2379")
    assert url.endswith(":8001")
    assert "0.0.0.0" not in url
    assert "//:" not in url
    assert "[::]" not in url


@pytest.fixture
async def world():
    made = EmbeddedWorld()
    await made.start()
    yield made
    await made.close()


def service_at(world: EmbeddedWorld, tmp_path: Path) -> WorkerService:
    cluster = DisaggCluster(cluster_uri=world.url)
    return WorkerService(LlmConfig(model=str(tmp_path), server_role="CONTEXT", disagg_cluster=cluster))


async def test_states_are_told_at_once(world: EmbeddedWorld, tmp_path: Path):
    service, reader = service_at(world, tmp_path), world.reader()
    async with registered(service):
        [info] = await reader.until(service.worker_id, state="STARTING", timeout_s=2.0)
        assert (info.url, info.role, info.model) == ("http://localhost:8000", "CONTEXT", tmp_path.name)
        assert info.incarnation == service.incarnation
        assert set(info.load) == {"running", "waiting", "free_blocks"}
        service.request_drain("a test")
        await reader.until(service.worker_id, state="DRAINING", timeout_s=0.9)  # sooner than the load is told
    await reader.until(timeout_s=2.0)


async def test_another_role_is_told_at_once(world: EmbeddedWorld, tmp_path: Path):
    service, reader = service_at(world, tmp_path), world.reader()
    async with registered(service):
        await reader.until(service.worker_id, timeout_s=2.0)
        service.change_role("GENERATION")
        await reader.until(
            service.worker_id, role="GENERATION", timeout_s=0.9
        )  # sooner than the load is told
        assert service.server_info()["role"] == "GENERATION"


async def test_taken_out_of_the_registry_means_drain(world: EmbeddedWorld, tmp_path: Path):
    service, reader = service_at(world, tmp_path), world.reader()
    async with registered(service):
        await reader.until(service.worker_id)
        await world.delete_by_hand(service.worker_id)
        await asyncio.wait_for(service.stopping.wait(), 5.0)
        assert service.state == "DRAINING"
        await reader.until()


async def test_no_registry_is_fine(tmp_path: Path):
    async with registered(WorkerService(LlmConfig(model=str(tmp_path)))):
        pass
