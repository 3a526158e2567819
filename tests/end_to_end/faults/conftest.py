import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

from fault_mesh import FaultMesh, new_session
from mesh import mesh
from serving.machine import describe

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


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


@pytest.fixture
def record() -> Callable[..., None]:
    """`record(name, **figures)` keeps what a long run measured in benchmarks/results/faults_<name>.json."""
    machine = describe()

    def write(name: str, **figures: Any) -> None:
        content = orjson.dumps({"machine": machine, **figures}, option=orjson.OPT_INDENT_2)
        (RESULTS / f"faults_{name}.json").write_bytes(content + b"\n")

    return write
