"""The router's own answers: validation, limits, models, health, status pages."""

import asyncio
import json
import logging

import pytest

import diptych
from diptych.discovery.static import StaticRegistry
from diptych.router.frontends.openai import parse_call, parse_prefill
from tests.router.conftest import Config, StartRouter

WHOLE = {"model": "fake", "prompt": "hello"}


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"x"', b"{'a': 1}", b'{"a": 1} x', b"\xff\xfe{}"])
async def test_body_must_be_a_json_object(start_router: StartRouter, context, generation, data):
    router = await start_router(context, generation)
    async with router.session.post(router.url + "/v1/completions", data=data) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_json"
    assert context.seen == []
    assert await router.metric("validation_exceptions_total") == 1


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_over_the_limit(start_router: StartRouter, context, generation, chunked):
    router = await start_router(context, generation)
    body = json.dumps({"prompt": "x" * 200_000}).encode()

    async def pieces():
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    data = pieces() if chunked else body
    async with router.session.post(router.url + "/v1/completions", data=data) as response:
        assert response.status == 413
        assert "100000 bytes" in (await response.json())["error"]["message"]


async def test_unknown_model(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    async with router.post({"model": "other", "prompt": "x"}) as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert error["code"] == "model_not_found"
    assert "'fake'" in error["message"]


async def test_without_a_model_both_legs_go_to_the_same_one(
    start_router: StartRouter, context, generation, spare_generation
):
    generation.model = "other"
    router = await start_router(context, generation, spare_generation)
    for _ in range(3):
        await router.text({"prompt": "x"})
    assert generation.seen == []


async def test_no_workers_at_all(start_router: StartRouter):
    router = await start_router(registry=StaticRegistry(), wait_ready=False)
    async with router.post(WHOLE) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
    async with router.session.get(router.url + "/health") as response:
        assert response.status == 503
        message = (await response.json())["error"]["message"]
    assert "no context worker is ready (none is known)" in message
    assert "no generation worker is ready" in message


async def test_request_id_is_made_when_the_given_one_cannot_be_used(
    start_router: StartRouter, context, generation
):
    router = await start_router(context, generation)
    async with router.post(WHOLE, headers={"X-Request-ID": "has space"}) as response:
        assert len(response.headers["X-Request-ID"]) == 32
    async with router.post({"model": "other"}, headers={"X-Request-ID": "abc"}) as response:
        assert response.status == 404
        assert response.headers["X-Request-ID"] == "abc"


async def test_health_names_what_is_missing(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    async with router.session.get(router.url + "/health") as response:
        assert response.status == 200
    await generation.stop()
    await router.text(WHOLE)  # finds out
    async with router.session.get(router.url + "/health") as response:
        assert response.status == 503
        message = (await response.json())["error"]["message"]
    assert f"no generation worker is ready ({generation.url} is DOWN)" in message
    async with router.session.get(router.url + "/live") as response:
        assert response.status == 200


async def test_status_pages(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    pages = {}
    for path in ("/version", "/v1/models", "/cluster_info"):
        async with router.session.get(router.url + path) as response:
            assert response.status == 200
            pages[path] = await response.json()
    assert pages["/version"] == {"version": diptych.__version__}
    assert [model["id"] for model in pages["/v1/models"]["data"]] == ["fake"]
    cluster = pages["/cluster_info"]
    assert cluster["is_ready"] is True
    assert cluster["minimal_instances"] == {"context_servers": 1, "generation_servers": 1}
    (server,) = cluster["current_workers"]["context_servers"]
    assert (server["host"], server["port"], server["role"]) == ("127.0.0.1", context.port, "CONTEXT")
    assert len(cluster["current_workers"]["generation_servers"]) == 1


async def test_metrics_are_prometheus_text(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    await router.text(WHOLE)
    await router.text({**WHOLE, "stream": True})
    async with router.session.get(router.url + "/prometheus/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = await response.text()
    for line in (
        "total_requests_total 2.0",
        "stream_requests_total 1.0",
        "nonstream_requests_total 1.0",
        "total_responses_total 2.0",
        "queue_latency_seconds_count 2.0",
        "ctx_total_requests_total 2.0",
        "ctx_completed_requests_total 2.0",
        "gen_completed_requests_total 2.0",
        "gen_first_token_latency_seconds_count 1.0",
        "gen_complete_latency_seconds_count 2.0",
        f'worker_ready{{role="CONTEXT",worker="{context.url}"}} 1.0',
    ):
        assert line in text.splitlines()


async def test_unknown_paths_and_methods(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    async with router.session.get(router.url + "/nowhere") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"
    async with router.session.get(router.url + "/v1/completions") as response:
        assert response.status == 405
        assert "it takes POST" in (await response.json())["error"]["message"]


async def test_a_worker_that_answers_nonsense_is_an_error_not_a_crash(
    start_router: StartRouter, context, generation
):
    context.script.answer["context"] = (200, {"hello": 1}, {})
    router = await start_router(context, generation)
    async with router.post(WHOLE) as response:
        assert response.status == 500
        assert "does not answer as one" in (await response.json())["error"]["message"]


async def test_slow_request_body_has_a_deadline(start_router: StartRouter, context, generation):
    router = await start_router(context, generation, config=Config(request_timeout_s=0.2))
    host, port = router.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert b" 504 " in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


def call(body: bytes):
    return parse_call("/v1/completions", {}, body, request_id="r", unique_id="u", arrived=0.0, timeout_s=1.0)


@pytest.mark.parametrize(
    "body", [b"{}", b" { } ", b'{"a":"{"}', b'{"a":{}}\r\n', b'{"disaggregated_params":{"x":1}}']
)
def test_leg_fields_are_spliced_into_any_object(body):
    before = {k: v for k, v in json.loads(body).items() if k != "disaggregated_params"}
    after = json.loads(call(body).context_body())
    assert after.pop("disaggregated_params")["request_type"] == "context_only"
    assert after == before


def test_prefill_without_optional_parts():
    prefill = parse_prefill(
        b'{"choices": [{"disaggregated_params": {"ticket_id": null}}, {"disaggregated_params": {}}]}'
    )
    assert prefill.ticket_ids() == []
    told = json.loads(call(b'{"n":2}').generation_body(prefill))
    assert "prompt_token_ids" not in told
    assert len(told["disaggregated_params"]["choices"]) == 2


async def test_start_timeout_says_what_is_missing_and_goes_on(
    start_router: StartRouter, context, generation, caplog
):
    await generation.stop()
    config = Config(server_start_timeout_s=0.1)
    caplog.set_level(logging.INFO)
    router = await start_router(context, generation, config=config, wait_ready=False)
    missing = f"still waiting: no generation worker is ready ({generation.url} is"
    await router.until(lambda: missing in caplog.text)
    await generation.start()
    await router.until(lambda: "ready: " in caplog.text)
    await router.text(WHOLE)
