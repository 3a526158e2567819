import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_mesh import FaultMesh
from mesh import mesh


@pytest.fixture(scope="session")
def fault_mesh(small_model, tmp_path_factory) -> Iterator[FaultMesh]:
    with mesh(tmp_path_factory.mktemp("faults")) as started:
        yield FaultMesh(started)


@pytest.fixture
def faults(fault_mesh: FaultMesh) -> Iterator[FaultMesh]:
    yield fault_mesh
    fault_mesh.mend()
    fault_mesh.assert_invariants()


@pytest.fixture
def sticky() -> dict[str, str]:
    """Requests with these headers go to the same workers."""
    return {"X-Session-ID": secrets.token_hex(4)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fault suite takes minutes and wants a machine of its own: `pytest -m slow tests/end_to_end/faults`."""
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.slow)
