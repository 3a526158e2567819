"""Workers that die, hang, refuse or are full, in each leg: who takes over, and what the client is told."""

import asyncio
import json

import pytest

from diptych.router.settings import Limits
from tests.router.conftest import FAST, FULL, STREAM, WHOLE, Config, StartRouter, last_event, no_connections


@pytest.mark.parametrize("failure", ["no_answer", "mid_head"])
async def test_context_leg_goes_to_another_worker(
    start_router: StartRouter, context, spare_context, generation, failure
):
    context.script.fail["context"] = failure
    router = await start_router(context, spare_context, generation)
    for _ in range(2):  # round robin: one of them meets the bad worker first
        text = await router.text(STREAM)
        assert text == spare_context.event("one") + generation.events(skip=1)
    # A kept connection that closes without a byte is tried once more on a new one.
    assert len(context.legs("context")) == (2 if failure == "no_answer" else 1)
    await no_connections(router)


async def test_context_503_goes_to_another_worker(
    start_router: StartRouter, context, spare_context, generation
):
    context.script.answer["context"] = (503, {"error": {"message": "draining"}}, {"Retry-After": "7"})
    router = await start_router(context, spare_context, generation)
    for _ in range(2):
        assert (await router.text(STREAM)).startswith(spare_context.event("one"))
    assert await router.metric("ctx_retry_requests_total") == len(context.legs("context")) > 0


async def test_stopped_context_worker_is_refused_and_replaced(
    start_router: StartRouter, context, spare_context, generation
):
    router = await start_router(context, spare_context, generation)
    await router.text(STREAM)
    await router.text(STREAM)
    await context.stop()
    for _ in range(4):
        assert (await router.text(STREAM)).startswith(spare_context.event("one"))


@pytest.mark.parametrize("stream", [False, True])
async def test_without_context_workers_generation_does_it_all(
    start_router: StartRouter, context, generation, stream
):
    router = await start_router(context, generation)
    await context.stop()
    for _ in range(2):
        text = await router.text({**WHOLE, "stream": stream})
        if stream:
            assert text == generation.events(skip=0)
        else:
            assert json.loads(text)["id"].startswith("cmpl-")
    assert [seen.leg for seen in generation.seen] == ["whole", "whole"]
    params = generation.seen[0].body.pop("disaggregated_params")
    assert params["request_type"] == "context_and_generation"
    assert generation.seen[0].body == {**WHOLE, "stream": stream}


async def test_503_of_the_only_context_worker_reaches_the_client_when_nobody_can_help(
    start_router: StartRouter, context, generation
):
    refusal = (503, {"error": {"message": "draining", "code": "x"}}, {"Retry-After": "7"})
    context.script.answer = {"context": refusal, "whole": refusal}
    router = await start_router(context, generation)
    await generation.stop()
    async with router.post(WHOLE) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
        assert "error" in await response.json()


@pytest.mark.parametrize("failure", ["no_answer", "mid_head", "before_body"])
async def test_generation_leg_goes_to_another_worker_with_the_same_ticket(
    start_router: StartRouter, context, generation, spare_generation, failure
):
    generation.script.fail["generation"] = failure
    router = await start_router(context, generation, spare_generation)
    for number in (1, 2):
        text = await router.text(STREAM)
        assert text == context.event("one") + spare_generation.events(skip=1)
        choice = spare_generation.seen[-1].body["disaggregated_params"]["choices"][0]
        assert choice["ticket_id"] == f"c0-ticket-{number}"
    assert len(generation.legs("generation")) == (2 if failure == "no_answer" else 1)
    # Of the request that was disturbed, once it is over: who had the ticket first may hold it still.
    await context.wait_for(lambda: len(context.released) == 1)
    await no_connections(router)


@pytest.mark.parametrize("failure", ["no_answer", "mid_body"])
async def test_whole_answer_survives_a_dead_generation_worker(
    start_router: StartRouter, context, generation, spare_generation, failure
):
    generation.script.fail["generation"] = failure
    router = await start_router(context, generation, spare_generation)
    for _ in range(2):
        assert "one two three four" in await router.text(WHOLE)
    assert await router.metric("gen_retry_requests_total") == 1


@pytest.mark.parametrize("status", [500, 503])
async def test_generation_5xx_goes_to_another_worker(
    start_router: StartRouter, context, generation, spare_generation, status
):
    generation.script.answer["generation"] = (status, {"error": {"message": "no"}}, {})
    router = await start_router(context, generation, spare_generation)
    for _ in range(2):
        assert (await router.text(STREAM)).endswith(spare_generation.events(skip=1))


async def test_context_worker_finishes_when_no_generation_worker_is_left(
    start_router: StartRouter, context, generation
):
    router = await start_router(context, generation)
    await generation.stop()
    text = await router.text(STREAM)
    assert text == context.event("one") + context.events(skip=1)
    assert [seen.leg for seen in context.seen] == ["context", "generation"]


@pytest.mark.parametrize("failure", ["mid_body", "mid_chunk"])
async def test_stream_that_breaks_off_ends_with_one_error_event(
    start_router: StartRouter, context, generation, failure
):
    generation.script.fail["generation"] = failure
    generation.script.keeps_journal = False
    router = await start_router(context, generation)
    text = await router.text(STREAM)
    error = last_event(text)["error"]
    assert error["code"] == "worker_lost"
    assert error["type"] == "service_unavailable"
    begin = context.event("one") + generation.event(" two")
    assert text.startswith(begin)
    assert text[len(begin) :].count("data: ") == 2  # the error and [DONE]: no half event
    await no_connections(router)


async def test_error_event_when_every_generation_leg_fails_returns_the_tickets(
    start_router: StartRouter, context, generation
):
    error = {"error": {"message": "gone", "type": "internal_error", "param": None, "code": None}}
    generation.script.answer["generation"] = (500, error, {})
    context.script.answer["generation"] = (500, error, {})
    router = await start_router(context, generation)
    text = await router.text(STREAM)
    assert text.startswith(context.event("one"))
    assert last_event(text) == error
    await context.wait_for(lambda: context.released == ["c0-ticket-1"])


@pytest.mark.parametrize("status", [400, 404, 422])
@pytest.mark.parametrize("leg", ["context", "generation"])
async def test_client_errors_pass_through(start_router: StartRouter, context, generation, status, leg):
    content = {"error": {"message": "bad max_tokens", "type": "t", "param": "max_tokens", "code": "c"}}
    worker = context if leg == "context" else generation
    worker.script.answer[leg] = (status, content, {"Retry-After": "3"})
    router = await start_router(context, generation)
    async with router.post(WHOLE) as response:
        assert response.status == status
        assert await response.json() == content
        assert response.headers["Retry-After"] == "3"
    assert len(worker.legs(leg)) == 1
    if leg == "generation":
        await context.wait_for(lambda: context.released == ["c0-ticket-1"])


@pytest.mark.parametrize("leg", ["context", "generation"])
@pytest.mark.parametrize("body", [STREAM, WHOLE])
async def test_a_full_line_sends_the_leg_elsewhere(
    start_router: StartRouter, context, spare_context, generation, spare_generation, leg, body
):
    full, other = (context, spare_context) if leg == "context" else (generation, spare_generation)
    full.script.answer[leg] = (429, FULL, {"Retry-After": "3"})
    router = await start_router(context, spare_context, generation, spare_generation)
    for _ in range(2):  # round robin: one of them, at least, meets the full worker first
        assert await router.text(body)
    assert full.legs(leg)
    assert len(other.legs(leg)) == 2


@pytest.mark.parametrize("leg", ["context", "generation"])
async def test_full_lines_everywhere_are_the_clients_429(start_router: StartRouter, context, generation, leg):
    for worker in (context, generation):
        worker.script.answer[leg] = (429, FULL, {"Retry-After": "3"})
    router = await start_router(context, generation)
    async with router.post(WHOLE) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "3"
        assert await response.json() == FULL
    if leg == "context":
        assert generation.seen == []  # it is not given what the context workers have no room for
    else:
        await context.wait_for(lambda: context.released == ["c0-ticket-1"])


async def test_client_error_after_the_first_token_is_an_event(start_router: StartRouter, context, generation):
    content = {"error": {"message": "bad", "type": "t", "param": None, "code": "c"}}
    generation.script.answer["generation"] = (400, content, {})
    router = await start_router(context, generation)
    assert last_event(await router.text(STREAM)) == content


@pytest.mark.parametrize("leg", ["context", "generation"])
async def test_hung_worker_ends_in_504(start_router: StartRouter, context, generation, leg):
    (context if leg == "context" else generation).script.fail[leg] = "hang"
    router = await start_router(context, generation, config=Config(request_timeout_s=0.3))
    async with router.post(WHOLE) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "deadline_exceeded"
    await no_connections(router)
    if leg == "generation":
        await context.wait_for(lambda: context.released == ["c0-ticket-1"])


async def test_stream_that_falls_silent_ends_in_an_error_event(
    start_router: StartRouter, context, generation
):
    generation.script.hold_after[2] = asyncio.Event()
    generation.script.keeps_journal = False
    limits = Limits(idle_s=0.2, probe_retry_s=FAST.probe_retry_s)
    router = await start_router(context, generation, limits=limits)
    error = last_event(await router.text(STREAM))["error"]
    assert error["code"] == "deadline_exceeded"
    await generation.wait_fate("generation", "cancelled")


async def test_a_leg_may_think_longer_than_the_idle_limit(start_router: StartRouter, context, generation):
    gate = context.script.hold["context"] = asyncio.Event()
    router = await start_router(context, generation, limits=Limits(idle_s=0.05))
    asyncio.get_running_loop().call_later(0.3, gate.set)
    assert await router.text(STREAM)


async def test_max_retries_bounds_the_attempts(start_router: StartRouter, context, spare_context, generation):
    for worker in (context, spare_context):
        worker.script.fail["context"] = "mid_head"
    router = await start_router(context, spare_context, generation, config=Config(max_retries=0))
    assert await router.text(STREAM) == generation.events(skip=0)
    assert len(context.legs("context")) + len(spare_context.legs("context")) == 1
