"""The fault suite. The tests' numbers:

F1  context worker killed: queued, in a prefill, in a transfer, after it   test_workers_die, test_transfers
F2  generation worker killed: waiting for KV, first step, later, last      test_workers_die
F3  hung and back                                                          test_workers_hang
F4  router killed, one of two                                              test_routers_die
F5  etcd killed, wiped, hung, its leases lost                              test_etcd, test_recorded
F6  restarted on the same port                                             test_workers_die
F7  clients leave in every phase, 300 at once                              test_clients_leave
F8  the generation worker refuses what the context worker took             test_clients_leave
F9  notices lost, doubled, late               test_clients_leave, tests/transceiver/test_partition
F14 drains, rolling restarts                                               test_drain, test_recorded
F16 roles change                                                           test_roles
F17 soak                                                                   test_soak
F18 twice the load                                                         test_overload
F19 partitions, one way and both                                           test_partitions, test_transfers
"""

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
