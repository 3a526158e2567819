"""GET /prometheus/metrics: what a dashboard can read of KV transfers, and Triton's names for what it knows."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from diptych.wire import EngineReady, EngineStats, LinkStats
from diptych.worker.metrics import WorkerMetrics

READY = EngineReady(
    pid=1,
    incarnation="me",
    max_seq_len=64,
    vocab_size=10,
    layout={},
    num_blocks=100,
    pool_bytes=4096,
    max_batch_size=8,
    kernel="torch",
)
STATS = EngineStats(
    free_blocks=60,
    cached_blocks=10,
    active_blocks=20,
    leased_blocks=10,
    total_blocks=100,
    tokens_per_block=16,
    waiting=3,
    running=5,
    prefilling=2,
    pending_prompt_tokens=700,
    fetching=1,
    steps=42,
    fetches=7,
    fetch_s=0.25,
    queued_fetches=4,
    links=[
        LinkStats(
            peer="10.0.0.1:7",
            transport="tcp",
            copies=7,
            bytes=4_000_000_000,
            wait_s=0.5,
            copy_s=2.0,
            verify_s=0.125,
            open=2,
            failures={"deadline": 3},
            probed_gb_s=2.5,
        )
    ],
)


def samples(ready=READY, model="m") -> dict[tuple, float]:
    text = WorkerMetrics(model, lambda: STATS, lambda: ready).render().decode()
    return {
        (
            sample.name,
            *sorted(value for key, value in sample.labels.items() if key not in ("model_name", "version")),
        ): (sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("copies_total", 7),
        ("bytes_total", 4e9),
        ("wait_seconds_total", 0.5),
        ("copy_seconds_total", 2),
        ("verify_seconds_total", 0.125),
        ("open_copies", 2),
        ("gigabytes_per_second", 2),
        ("probed_gigabytes_per_second", 2.5),
    ],
)
def test_every_link_has_its_figures(name, value):
    assert samples()[f"diptych_kv_link_{name}", "10.0.0.1:7", "tcp"] == value


def test_failures_of_a_link_have_their_code_and_waiting_fetches_are_counted():
    found = samples()
    assert found["diptych_kv_link_failures_total", "10.0.0.1:7", "deadline", "tcp"] == 3
    assert found[("diptych_kv_queued_fetches",)] == 4


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("request", {"context": 2, "scheduled": 5, "max": 8, "active": 6, "waiting": 3}),
        ("runtime_memory", {"pinned": 0, "gpu": 0, "cpu": 4096}),
        ("kv_cache_block", {"tokens_per": 16, "used": 30, "free": 70, "max": 100, "fraction": 0.3}),
        ("inflight_batcher", {"generation_requests": 3, "total_context_tokens": 700, "micro_batch_id": 0}),
        ("general", {"iteration_counter": 42}),
    ],
)
def test_tritons_metrics(name, labels):
    found = samples()
    for label, value in labels.items():
        key = (f"nv_trt_llm_{name}_metrics", *sorted((label, "m")))
        assert found[key] == value, key


def test_tritons_text_is_as_the_document_prints_it():
    text = WorkerMetrics("tensorrt_llm", lambda: STATS, lambda: READY).render().decode()
    for line in (
        "# TYPE nv_trt_llm_disaggregated_serving_metrics counter",
        'nv_trt_llm_disaggregated_serving_metrics{disaggregated_serving_type="request_count",'
        'model="tensorrt_llm",version="1"} 7',
        'nv_trt_llm_disaggregated_serving_metrics{disaggregated_serving_type="kv_cache_transfer_ms",'
        'model="tensorrt_llm",version="1"} 250.0',
        'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 6',
        'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 16',
    ):
        assert line in text.splitlines()


def test_before_the_model_is_loaded_and_with_an_awkward_name():
    assert not [key for key in samples(ready=None) if key[0].startswith("nv_")]
    assert ("nv_trt_llm_general_metrics", 'C:\\a"b', "iteration_counter") in samples(model='C:\\a"b')
