"""The disaggregated server's YAML, as the documents print it, and with every mistake that has a sentence."""

from pathlib import Path

import pytest

from diptych.config import DisaggConfig, load_disagg_config
from diptych.config.disagg import disagg_config
from diptych.errors import ConfigError

TWO_AND_ONE = """\
hostname: localhost
port: 8000
backend: pytorch
context_servers:
  num_instances: 2
  urls:
      - "localhost:8001"
      - "localhost:8002"
generation_servers:
  num_instances: 1
  urls:
      - "localhost:8003"
"""

WITH_WORKER_OPTIONS = """\
hostname: localhost
port: 8000
model: TinyLlama/TinyLlama-1.1B-Chat-v1.0
backend: "pytorch"
disable_overlap_scheduler: True
context_servers:
  num_instances: 2
  tensor_parallel_size: 1
  pipeline_parallel_size: 1
  kv_cache_config:
    free_gpu_memory_fraction: 0.8
  cache_transceiver_config:
    backend: UCX
  urls:
      - "localhost:8001"
      - "localhost:8002"
generation_servers:
  num_instances: 1
  tensor_parallel_size: 1
  pipeline_parallel_size: 1
  cache_transceiver_config:
    backend: UCX
  urls:
      - "localhost:8003"
"""


def load(tmp_path: Path, text: str, **overrides: object) -> DisaggConfig:
    path = tmp_path / "disagg.yaml"
    path.write_text(text, encoding="utf-8")
    return load_disagg_config(path, overrides)


def refuse(data: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        disagg_config(data, source="f.yaml")
    assert caught.value.message.startswith("f.yaml")
    return caught.value.message


def test_example_as_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = load(tmp_path, TWO_AND_ONE)
    assert (config.hostname, config.port, config.backend) == ("localhost", 8000, "pytorch")
    assert config.context_servers.urls == ("localhost:8001", "localhost:8002")
    assert config.generation_servers.count == 1
    assert config.context_servers.router.type == "round_robin"
    assert (config.max_retries, config.request_timeout_s, config.num_workers) == (1, 180, 1)
    config.require_urls("f.yaml")
    assert caplog.messages == []


def test_example_with_worker_options_as_printed(tmp_path: Path):
    config = load(tmp_path, WITH_WORKER_OPTIONS)
    assert config.model == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert config.context_servers.options["kv_cache_config"] == {"free_gpu_memory_fraction": 0.8}
    assert config.generation_servers.options["cache_transceiver_config"] == {"backend": "UCX"}
    assert "kv_cache_config" not in config.generation_servers.options


def test_top_level_worker_options_hold_for_both_sections():
    config = disagg_config(
        {
            "max_batch_size": 4,
            "free_gpu_memory_fraction": 0.3,
            "context_servers": {},
            "generation_servers": {},
        },
        source="f.yaml",
    )
    for section in (config.context_servers, config.generation_servers):
        assert section.options == {
            "max_batch_size": 4,
            "kv_cache_config": {"free_gpu_memory_fraction": 0.3},
        }
        assert section.count == 1


def test_a_section_may_not_differ_from_the_top_level():
    message = refuse({"max_batch_size": 4, "generation_servers": {"max_batch_size": 8}})
    assert "generation_servers.max_batch_size is 8, but the top level says 4" in message
    assert "context_servers.model is 'a'" in refuse({"model": "b", "context_servers": {"model": "a"}})
    disagg_config({"max_batch_size": 4, "generation_servers": {"max_batch_size": 4}}, source="f.yaml")


def test_command_line_wins(tmp_path: Path):
    config = load(tmp_path, TWO_AND_ONE, request_timeout_s=5.0, port=1234)
    assert (config.request_timeout_s, config.port) == (5.0, 1234)


def test_router_section_keeps_the_options_of_its_policy():
    config = disagg_config(
        {"context_servers": {"router": {"type": "load_balancing", "use_tokens": True}}}, source="f.yaml"
    )
    assert config.context_servers.router.type == "load_balancing"
    assert config.context_servers.router.options == {"use_tokens": True}


def test_misspelt_interval_of_disagg_cluster(caplog: pytest.LogCaptureFixture):
    config = disagg_config(
        {"disagg_cluster": {"cluster_uri": "etcd://h:2379", "inactive_interval_sec": 3}}, source="f.yaml"
    )
    assert config.disagg_cluster is not None
    assert config.disagg_cluster.inactive_timeout_sec == 3
    assert len(caplog.messages) == 1


def test_known_keys_without_effect(caplog: pytest.LogCaptureFixture):
    disagg_config({"otlp_config": {"otlp_traces_endpoint": "http://h:4317"}}, source="f.yaml")
    assert "otlp_config" in caplog.text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"context_server": {}}, 'unknown key "context_server"; did you mean "context_servers"?'),
        ({"max_retrys": 3}, 'unknown key "max_retrys"; did you mean "max_retries"?'),
        ({"context_servers": {"url": ["a:1"]}}, 'unknown key "context_servers.url"; did you mean "urls"?'),
        ({"context_servers": {"max_batchsize": 1}}, 'did you mean "max_batch_size"?'),
        ({"context_servers": {"kv_cache_config": {"x": 1}}}, 'unknown key "kv_cache_config.x"'),
        ({"context_servers": {"max_batch_size": "a"}}, "max_batch_size must be a whole number, not 'a'"),
        (
            {"context_servers": {"num_instances": 3, "urls": ["a:1"]}},
            "context_servers.num_instances is 3, but context_servers.urls names 1; they must agree",
        ),
        ({"context_servers": {"urls": "a:1"}}, "context_servers.urls must be a list"),
        ({"context_servers": {"urls": [8001]}}, "context_servers.urls must be texts"),
        ({"context_servers": {"urls": ["localhost"]}}, "'localhost' cannot be used: the port is missing"),
        ({"context_servers": {"urls": ["a:1", "a:1"]}}, "context_servers.urls names a:1 more than once"),
        ({"context_servers": []}, "context_servers must be a mapping, not []"),
        ({"context_servers": {"router": "x"}}, "context_servers.router must be a mapping"),
        ({"port": 99999}, "port must be from 0 to 65535, not 99999"),
        ({"port": "x"}, "port must be a whole number, not 'x'"),
        ({"max_retries": -1}, "max_retries must be a whole number >= 0, not -1"),
        ({"schedule_style": "x"}, "schedule_style must be one of context_first, generation_first, not 'x'"),
        ({"disagg_cluster": {}}, "cluster_uri"),
        ({"disagg_cluster": {"cluster_uri": "zk://h:1"}}, "must be etcd://host:port[,host:port] or http"),
        ({"disagg_cluster": {"cluster_uri": "etcd://a:1,b"}}, "'b' is not a host:port"),
        ({"disagg_cluster": {"cluster_uri": "http://"}}, "not 'http://'"),
        (
            {
                "disagg_cluster": {
                    "cluster_uri": "etcd://h:1",
                    "heartbeat_interval_sec": 9,
                    "inactive_timeout_sec": 9,
                }
            },
            "heartbeat_interval_sec (9) must be less than inactive_timeout_sec (9)",
        ),
    ],
)
def test_sentences(data: dict, expected: str):
    assert expected in refuse(data)


def test_the_router_alone_needs_urls():
    config = disagg_config({"context_servers": {"urls": ["a:1"]}}, source="f.yaml")
    with pytest.raises(ConfigError, match=r"generation_servers\.urls must name at least one worker"):
        config.require_urls("f.yaml")
    disagg_config({"disagg_cluster": {"cluster_uri": "etcd://h:1"}}, source="f.yaml").require_urls("f.yaml")


def test_a_router_that_keeps_the_registry_is_one_process():
    cluster = {"cluster_uri": "http://h:8000"}
    config = disagg_config({"disagg_cluster": cluster, "num_workers": 2}, source="f.yaml")
    with pytest.raises(ConfigError, match="num_workers must be 1, not 2"):
        config.require_urls("f.yaml")


def test_minimal_instances():
    cluster = {"cluster_uri": "etcd://h:1", "minimal_instances": {"generation_servers": 3}}
    config = disagg_config({"disagg_cluster": cluster}, source="f.yaml")
    assert config.minimal_instances is not None
    assert (config.minimal_instances.context_servers, config.minimal_instances.generation_servers) == (1, 3)
    assert disagg_config({}, source="f.yaml").minimal_instances is None
