"""GPUs of one host that may not read each other: what the log says, and that TCP does the work."""

import logging

import pytest

torch = pytest.importorskip("torch")

from kv_nodes import LAYOUT  # noqa: E402

from diptych.transceiver import cuda_ipc  # noqa: E402
from diptych.transceiver.cuda_driver import DriverError  # noqa: E402
from diptych.transceiver.pool_memory import PoolIdentity  # noqa: E402
from diptych.transceiver.routes import Routes  # noqa: E402
from diptych.transceiver.ticket import OwnerRank  # noqa: E402
from diptych.transceiver.transport import Unreachable  # noqa: E402


class Region:
    """An owner of this host whose pool is on a GPU."""

    pid = 1

    class open:
        identity = PoolIdentity.of(LAYOUT, 1, "it", on_device=True)

        class note:
            data = bytes(128)


class Driver:
    def __init__(self, error: str) -> None:
        self._error = error

    def open(self, handle: bytes) -> int:
        raise DriverError("cuIpcOpenMemHandle", self._error)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "nvidia-smi topo -p2p r"),
        ("CUDA_ERROR_TOO_MANY_PEERS", "fewer GPUs"),
        ("CUDA_ERROR_MAP_BUFFER_OBJECT_FAILED", "--ipc=host --pid=host"),
    ],
)
def test_the_log_warns_with_reason_and_remedy(error, remedy, caplog):
    with pytest.raises(Unreachable) as caught:
        cuda_ipc._open(Region(), Driver(error))
    routes = Routes({}, measure=False)
    owner = OwnerRank(
        ticket_id="1", incarnation="it", layout=LAYOUT, fingerprint="", host="10.0.0.1", port=7, transports={}
    )
    with caplog.at_level(logging.WARNING, "diptych.transceiver.routes"):
        routes.detour(owner, "cuda_ipc", caught.value)
    [line] = caplog.messages
    assert line.startswith("KV transport to 10.0.0.1:7 cannot be cuda_ipc: its GPU memory cannot be opened: ")
    assert error in line
    assert remedy in line
