"""Which transports a worker opens, by its YAML, TensorRT-LLM's environment variables and what is installed."""

import pytest

from diptych.errors import ConfigError
from diptych.transceiver import packages
from diptych.worker.kv_backend import Transports, choose_transports


@pytest.fixture
def installed(monkeypatch):
    """Names of the optional transports whose packages are there."""
    names: set[str] = set()
    remedy = {"nixl": "pip install nixl-cu13", "ucx": "pip install ucxx-cu13"}
    monkeypatch.setattr(packages, "missing_package", lambda name: None if name in names else remedy.get(name))
    return names


def refusal(backend, environment=None) -> str:
    with pytest.raises(ConfigError) as caught:
        choose_transports(backend, environment or {})
    return caught.value.message


@pytest.mark.parametrize("backend", ["DEFAULT", None])
def test_default_is_what_is_installed(installed, backend):
    assert choose_transports(backend, {}) == Transports(("shm", "tcp"))
    installed |= {"nixl"}
    assert choose_transports(backend, {}) == Transports(("shm", "tcp"), ("nixl",))


NIXL = Transports(("nixl", "tcp"), named=True)
UCX = Transports(("ucx", "tcp"), named=True)
TCP = Transports(("tcp",), named=True)


@pytest.mark.parametrize(
    ("backend", "transports"),
    [("SHM", ("shm",)), ("TCP", ("tcp",)), ("NIXL", ("nixl", "tcp")), ("UCX", ("ucx", "tcp"))],
)
def test_a_name_comes_first(installed, backend, transports):
    installed |= {"nixl", "ucx"}
    assert choose_transports(backend, {}) == Transports(transports, named=True)


@pytest.mark.parametrize("backend", ["NIXL", "UCX"])
def test_a_missing_package_is_a_warning_with_the_remedy(installed, backend, caplog):
    assert choose_transports(backend, {}) == Transports(("shm", "tcp"))
    (message,) = caplog.messages
    assert message.startswith(f"cache_transceiver_config.backend asks for {backend}")
    assert f"({packages.missing_package(backend.lower())})" in message


@pytest.mark.parametrize("backend", ["MOONCAKE", "MPI"])
def test_a_backend_that_we_do_not_have_says_what_to_use(installed, backend):
    message = refusal(backend)
    assert f"asks for {backend}, which is not in this version; use DEFAULT" in message
    assert "NIXL, UCX" in message


class TestEnvironment:
    def test_it_speaks_where_the_yaml_says_default(self, installed, caplog):
        installed |= {"ucx"}
        assert choose_transports("DEFAULT", {"TRTLLM_USE_UCX_KVCACHE": "1"}) == UCX
        assert caplog.messages == []

    def test_zero_is_no(self, installed):
        assert choose_transports("DEFAULT", {"TRTLLM_USE_MPI_KVCACHE": "0"}) == Transports(("shm", "tcp"))

    def test_the_yaml_wins_and_the_log_says_so(self, installed, caplog):
        assert choose_transports("TCP", {"TRTLLM_USE_MPI_KVCACHE": "1"}) == TCP
        assert caplog.messages == [
            "TRTLLM_USE_MPI_KVCACHE is ignored: cache_transceiver_config.backend is TCP"
        ]

    def test_no_conflict_no_warning(self, installed, caplog):
        installed |= {"nixl"}
        assert choose_transports("NIXL", {"TRTLLM_USE_NIXL_KVCACHE": "1"}) == NIXL
        assert caplog.messages == []

    def test_two_variables(self, installed, caplog):
        installed |= {"nixl", "ucx"}
        both = {"TRTLLM_USE_UCX_KVCACHE": "1", "TRTLLM_USE_NIXL_KVCACHE": "1"}
        assert choose_transports("DEFAULT", both) == UCX
        assert caplog.messages == ["TRTLLM_USE_NIXL_KVCACHE is ignored: TRTLLM_USE_UCX_KVCACHE comes first"]

    def test_errors_name_the_variable(self, installed):
        assert refusal("DEFAULT", {"TRTLLM_USE_MPI_KVCACHE": "1"}).startswith("TRTLLM_USE_MPI_KVCACHE asks")
