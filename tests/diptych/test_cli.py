"""The command line: what reaches the worker and the router, and how mistakes end."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from diptych import __version__
from diptych.cli import main
from diptych.listen import open_listener

URLS = "context_servers: {urls: ['localhost:1']}\ngeneration_servers: {urls: ['localhost:2']}\n"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that reached a worker or the router."""
    seen: list[Any] = []

    def serve(config: Any, make_registry: Any) -> None:
        seen.append(config)

    worker = types.ModuleType("diptych.worker.app")
    worker.run = seen.append  # type: ignore[attr-defined]
    router = types.ModuleType("diptych.router.server")
    router.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diptych.worker.app", worker)
    monkeypatch.setitem(sys.modules, "diptych.router.server", router)
    return seen


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "file.yaml"
        path.write_text(text)
        return str(path)

    return write


class TestServe:
    @pytest.mark.parametrize("first", [["serve"], []])
    def test_serve_is_implied(self, ran: list[Any], first: list[str]):
        assert invoke(*first, "some/model", "--port", "0").exit_code == 0
        assert ran[0].model == "some/model"

    def test_options_may_come_first(self, ran: list[Any]):
        assert invoke("--port", "0", "m").exit_code == 0
        assert ran[0].model == "m"

    def test_underscores_and_dashes(self, ran: list[Any]):
        for name in ("--max_batch_size", "--max-batch-size"):
            assert invoke("m", "--port", "0", name, "3").exit_code == 0
        assert [config.max_batch_size for config in ran] == [3, 3]

    def test_command_of_the_documents(self, ran: list[Any], yaml_file):
        file = yaml_file("cache_transceiver_config: {backend: UCX, max_tokens_in_buffer: 2048}\n")
        result = invoke(
            *("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "--host", "localhost", "--port", "0"),
            *("--backend", "pytorch", "--tp_size", "1", "--kv_cache_free_gpu_memory_fraction", "0.5"),
            *("--server-role", "context", "--extra_llm_api_options", file),
        )
        assert result.exit_code == 0, result.output
        [config] = ran
        assert config.server_role == "CONTEXT"
        assert config.kv_cache_config.free_gpu_memory_fraction == 0.5
        assert config.cache_transceiver_config.backend == "UCX"

    def test_the_worker_gets_an_open_listener(self, monkeypatch: pytest.MonkeyPatch):
        listening = []

        def run(config: Any) -> None:
            with pytest.raises(Exception, match=f"localhost:{config.port}: the port is in use"):
                open_listener("localhost", config.port)
            listening.append(config.listen_fd)

        worker = types.ModuleType("diptych.worker.app")
        worker.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "diptych.worker.app", worker)
        assert invoke("m", "--port", "0").exit_code == 0
        assert isinstance(listening[0], int)

    def test_chunked_prefill_can_be_switched(self, ran: list[Any]):
        invoke("m", "--port", "0")
        invoke("m", "--port", "0", "--enable_chunked_prefill")
        invoke("m", "--port", "0", "--no_enable_chunked_prefill")
        assert [config.enable_chunked_prefill for config in ran] == [True, True, False]

    def test_port_in_use(self, ran: list[Any]):
        with open_listener("localhost", 0) as other:
            port = other.getsockname()[1]
            result = invoke("m", "--port", str(port))
        assert result.exit_code == 2
        assert (
            result.output
            == f"error: cannot listen on localhost:{port}: the port is in use by another process\n"
        )
        assert ran == []

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--server_role", "X"], "server_role must be CONTEXT, GENERATION or BOTH, not 'X'"),
            (["--grpc"], "--grpc is not supported"),
            (["--metadata_server_config_file", "x"], "needs --server_role"),
            (["--disagg_cluster_uri", "etcd://h:1"], "needs --server_role"),
            (["--server_role", "CONTEXT", "--disagg_cluster_uri", "h:1"], "cluster_uri must be etcd://"),
            (["--pp_size", "2"], "pipeline_parallel_size must be 1, not 2"),
            (["--config", "absent.yaml"], "cannot read the configuration file absent.yaml"),
        ],
    )
    def test_startup_errors_are_one_line(self, ran: list[Any], arguments: list[str], expected: str):
        result = invoke("m", *arguments)
        assert result.exit_code == 2
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1
        assert expected in result.output
        assert ran == []

    def test_metadata_file_is_read(self, ran: list[Any], yaml_file):
        file = yaml_file("hostnme: x\n")
        result = invoke("m", "--server_role", "CONTEXT", "--metadata_server_config_file", file)
        assert 'did you mean "hostname"?' in result.output

    def test_where_to_register(self, ran: list[Any], yaml_file):
        file = yaml_file("server_type: etcd\nendpoints: ['a:1', 'b:2']\ncluster_name: blue\n")
        role = ("--port", "0", "--server_role", "context")
        assert invoke("m", *role, "--metadata_server_config_file", file).exit_code == 0
        assert invoke("m", *role, "--disagg_cluster_uri", "etcd://a:1,b:2").exit_code == 0
        assert invoke("m", *role, "--disagg_cluster_uri", "http://router:8000").exit_code == 0
        first, second, third = ran
        assert first.metadata_server.urls == ("http://a:1", "http://b:2")
        assert first.metadata_server.cluster_name == "blue"
        assert second.disagg_cluster.endpoints == ("http://a:1", "http://b:2")
        assert third.disagg_cluster.endpoints == ("http://router:8000",)
        assert (second.disagg_cluster.is_embedded, third.disagg_cluster.is_embedded) == (False, True)

    def test_misspelt_option_and_command(self, ran: list[Any]):
        result = invoke("m", "--max_batchsize", "3")
        assert result.exit_code == 2
        assert "--max_batch_size" in result.output
        result = invoke("disagregated", "-c", "x.yaml")
        assert result.exit_code == 2
        assert 'did you mean "disaggregated"?' in result.output


class TestDisaggregated:
    def test_options(self, ran: list[Any], yaml_file):
        file = yaml_file("port: 0\n" + URLS)
        result = invoke(
            "disaggregated", "-c", file, "-t", "7", "-r", "9", "-l", "error", "--metrics-log-interval", "3"
        )
        assert result.exit_code == 0, result.output
        [config] = ran
        assert (config.server_start_timeout_s, config.request_timeout_s, config.log_level) == (7, 9, "error")
        assert config.port > 0

    def test_missing_urls(self, ran: list[Any], yaml_file):
        result = invoke("disaggregated", "-c", yaml_file("context_servers: {urls: ['a:1']}\n"))
        assert result.exit_code == 2
        assert "generation_servers.urls must name at least one worker" in result.output

    @pytest.mark.parametrize("listed", [URLS, ""])
    def test_metadata_server(self, ran: list[Any], yaml_file, listed: str):
        file = yaml_file("port: 0\n" + listed)
        metadata = Path(file).with_name("metadata.yaml")
        metadata.write_text("hostname: etcd.internal\nrefersh_interval: 1.0\n")
        result = invoke("disaggregated", "-c", file, "-m", str(metadata))
        assert result.exit_code == 0, result.output
        assert ran[0].metadata_server.urls == ("http://etcd.internal:2379",)
        assert ran[0].metadata_server.refresh_interval == 1.0

    def test_two_places_to_register(self, ran: list[Any], yaml_file):
        file = yaml_file("disagg_cluster: {cluster_uri: 'etcd://h:1'}\n")
        metadata = Path(file).with_name("metadata.yaml")
        metadata.write_text("server_type: etcd\n")
        result = invoke("disaggregated", "-c", file, "-m", str(metadata))
        assert result.exit_code == 2
        assert "use one of them" in result.output

    def test_mpi_worker_starts_on_one_rank_only(self, monkeypatch: pytest.MonkeyPatch, yaml_file):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
        assert invoke("disaggregated_mpi_worker", "-c", yaml_file(URLS)).exit_code == 0
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
        result = invoke("disaggregated_mpi_worker", "-c", yaml_file(URLS))
        assert "model is missing" in result.output


def test_up_needs_a_model(yaml_file):
    result = invoke("up", "-c", yaml_file(URLS))
    assert result.exit_code == 2
    assert result.output.startswith("error: model is missing")


def test_version():
    assert invoke("version").output.strip() == __version__
    assert invoke("--version").output.strip() == __version__


def test_help_lists_the_commands():
    output = invoke("--help").output
    for command in ("serve", "disaggregated", "up", "demo", "drain", "version"):
        assert command in output


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "diptych.cli", "m", "--server_role", "X"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: command line: server_role must be")
