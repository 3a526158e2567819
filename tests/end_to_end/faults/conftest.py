import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_mesh import FaultMesh, new_session
from mesh import mesh


@pytest.fixture(scope="session")
def fault_mesh(small_model, tmp_path_factory) -> Iterator[FaultMesh]:
    with ExitStack() as stack, mesh(tmp_path_factory.mktemp("faults")) as started:
        yield FaultMesh(started, stack)


@pytest.fixture
def faults(fault_mesh: FaultMesh) -> Iterator[FaultMesh]:
    yield fault_mesh
    fault_mesh.mend()
    fault_mesh.assert_invariants()


@pytest.fixture
def sticky() -> dict[str, str]:
    """Requests with these headers go to the same workers."""
    return new_session()
