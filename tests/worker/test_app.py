"""A worker's HTTP side before there is an engine."""

from pathlib import Path

from aiohttp.test_utils import TestClient, TestServer

from diptych.config import LlmConfig
from diptych.worker.app import create_app
from diptych.worker.service import WorkerService


async def test_a_release_that_comes_while_the_model_loads_returns_nothing(tmp_path: Path):
    """It is meant for the process that had the address before."""
    app = create_app(WorkerService(LlmConfig(model=str(tmp_path))))
    async with TestClient(TestServer(app)) as client:
        for what in ({"ticket_ids": ["t"]}, {"disagg_request_ids": ["r"]}):
            response = await client.post("/kv/release", json=what)
            assert response.status == 200
            assert await response.json() == {"released": 0}
