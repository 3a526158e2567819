"""The two legs through a real router and fake workers: what the client gets, what each worker was told."""

import asyncio
import json

import pytest

from diptych.router.settings import Limits
from tests.fakes.fake_worker import FakeWorker
from tests.router.conftest import FAST, Config, StartRouter

STREAM = {"model": "fake", "prompt": "hello", "stream": True}
WHOLE = {"model": "fake", "prompt": "hello"}
FULL = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "overloaded"}}


def last_event(text: str) -> dict:
    """The error event before the end of a failed stream."""
    assert text.endswith("\n\ndata: [DONE]\n\n")
    return json.loads(text.split("\n\n")[-3].removeprefix("data: "))


async def no_connections(router) -> None:
    """Every upstream connection is either idle or closed."""
    for worker in router.pool.workers:
        for _ in range(100):
            if all(connection.exchange is None for connection in worker.client.connections):
                break
            await asyncio.sleep(0)
        assert all(connection.exchange is None for connection in worker.client.connections)
        assert worker.in_flight == 0


async def test_stream_is_head_then_generation_bytes_verbatim(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    async with router.post(STREAM, headers={"X-Request-ID": "abc"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["X-Request-ID"] == "abc"
        assert response.headers["X-Diptych-Context-Worker"] == context.url
        timing = response.headers["Server-Timing"]
        assert "router_queue;dur=" in timing
        assert "prefill;dur=1.5" in timing
        assert "ctx_leg;dur=" in timing
        text = await response.text()
    assert text == context.event("one") + generation.events(skip=1)
    await no_connections(router)
    assert context.released == []


async def test_tickets_whose_blocks_were_not_fetched_are_returned_while_the_stream_runs(
    start_router: StartRouter, context, generation
):
    generation.script.fetched = "0"
    generation.script.hold_after[2] = asyncio.Event()
    router = await start_router(context, generation)
    reading = asyncio.create_task(router.text(STREAM))
    await context.wait_for(lambda: context.released == ["c0-ticket-1"])
    assert not reading.done()
    generation.script.hold_after[2].set()
    assert await reading == context.event("one") + generation.events(skip=1)
    await no_connections(router)
    assert context.released == ["c0-ticket-1"]


async def test_tickets_of_which_nothing_is_known_are_returned_at_the_end(
    start_router: StartRouter, context, generation
):
    generation.script.fetched = None
    generation.script.hold_after[2] = asyncio.Event()
    router = await start_router(context, generation)
    reading = asyncio.create_task(router.text(STREAM))
    await generation.wait_for(lambda: generation.legs("generation"))
    assert context.released == []
    generation.script.hold_after[2].set()
    assert await reading == context.event("one") + generation.events(skip=1)
    await context.wait_for(lambda: context.released == ["c0-ticket-1"])


async def test_what_each_leg_is_told(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    raw = b'{"prompt": "h\\u00e9", "model" : "fake", "n":1}\n'
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    async with router.session.post(
        router.url + "/v1/completions", data=raw, headers={"traceparent": trace}
    ) as response:
        answer = await response.json()
        request_id = response.headers["X-Request-ID"]
    first, second = context.seen[0], generation.seen[0]
    assert first.raw.startswith(raw.strip()[:-1])
    params = first.body["disaggregated_params"]
    assert params["request_type"] == "context_only"
    assert params["response_id"] == "cmpl-" + params["disagg_request_id"]
    assert answer["id"] == params["response_id"]
    told = second.body["disaggregated_params"]
    assert told["request_type"] == "generation_only"
    assert (told["response_id"], told["created"]) == (params["response_id"], params["created"])
    assert told["choices"][0]["ticket_id"] == "c0-ticket-1"
    assert told["choices"][0]["first_gen_tokens"] == [42]
    assert second.body["prompt_token_ids"] == [[1, 2, 3]]
    for seen in (first, second):
        assert seen.headers["X-Request-ID"] == request_id
        assert seen.headers["traceparent"] == trace
        assert 0 < int(seen.headers["X-Diptych-Timeout-Ms"]) <= 20_000


async def test_whole_answer_is_the_generation_workers(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    answer = json.loads(await router.text(WHOLE, path="/v1/chat/completions"))
    assert answer["choices"][0]["text"] == "one two three four"
    assert answer["id"].startswith("chatcmpl-")
    assert await router.metric("gen_completed_requests_total") == 1
    assert await router.metric("total_responses_total") == 1


async def test_first_token_does_not_wait_for_the_generation_leg(
    start_router: StartRouter, context, generation
):
    gate = generation.script.hold["generation"] = asyncio.Event()
    router = await start_router(context, generation)
    async with router.post(STREAM) as response:
        assert await response.content.readuntil(b"\n\n") == context.event("one").encode()
        await generation.wait_for(lambda: generation.legs("generation"))
        gate.set()
        assert (await response.read()).decode() == generation.events(skip=1)


async def test_events_are_not_held_back(start_router: StartRouter, context, generation):
    gate = generation.script.hold_after[2] = asyncio.Event()
    router = await start_router(context, generation)
    async with router.post(STREAM) as response:
        await response.content.readuntil(b"\n\n")
        assert await response.content.readuntil(b"\n\n") == generation.event(" two").encode()
        gate.set()
        await response.read()


@pytest.mark.parametrize("stream", [False, True])
async def test_finished_on_the_context_leg(start_router: StartRouter, context, generation, stream):
    context.script.finish_on_context = True
    router = await start_router(context, generation)
    text = await router.text({**WHOLE, "stream": stream})
    if stream:
        assert text == context.event("one") + "data: [DONE]\n\n"
    else:
        answer = json.loads(text)
        assert answer["choices"] == [{"index": 0, "text": "one", "finish_reason": "stop"}]
        assert not {"prompt_token_ids", "finished", "stream_head"} & set(answer)
    assert generation.seen == []


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


async def test_client_gone_during_the_context_leg(start_router: StartRouter, context, generation):
    context.script.hold["context"] = asyncio.Event()
    router = await start_router(context, generation)
    request = asyncio.create_task(router.text(STREAM))
    await context.wait_for(lambda: context.legs("context"))
    request.cancel()
    await context.wait_fate("context", "cancelled")
    await no_connections(router)
    assert await router.metric("cancelled_requests_total") == 1


async def test_client_gone_before_generation_answers_returns_tickets(
    start_router: StartRouter, context, generation
):
    generation.script.hold["generation"] = asyncio.Event()
    router = await start_router(context, generation)
    request = asyncio.create_task(router.text(WHOLE))
    await generation.wait_for(lambda: generation.legs("generation"))
    request.cancel()
    await generation.wait_fate("generation", "cancelled")
    await context.wait_for(lambda: context.released == ["c0-ticket-1"])
    await no_connections(router)


async def test_client_gone_in_the_middle_of_the_stream(start_router: StartRouter, context, generation):
    generation.script.hold_after[2] = asyncio.Event()
    router = await start_router(context, generation)
    async with router.post(STREAM) as response:
        await response.content.readuntil(b"\n\n")
        await response.content.readuntil(b"\n\n")
        response.close()
    await generation.wait_fate("generation", "cancelled")
    await no_connections(router)


async def test_slow_client_holds_the_worker_back(start_router: StartRouter, context, generation):
    """The router buffers a bounded part of what a client does not read, and loses none of it."""
    generation.script.tokens = [str(n) for n in range(400)]
    generation.script.padding = 100_000
    router = await start_router(context, generation)
    async with router.post(STREAM, read_bufsize=1024) as response:
        await response.content.readuntil(b"\n\n")
        (worker,) = (w for w in router.pool.workers if w.worker_id == generation.url)
        paused = False
        for _ in range(2000):
            reading = [c.transport.is_reading() for c in worker.client.connections if c.exchange]
            paused = bool(reading) and not any(reading)
            if paused:
                break
            await asyncio.sleep(0.001)
        assert paused
        assert generation.seen[0].fate == "running"
        assert (await response.read()).decode() == generation.events(skip=1)
    await no_connections(router)


async def test_deadline_passes_while_the_client_does_not_read(start_router: StartRouter, context, generation):
    generation.script.tokens = [str(n) for n in range(400)]
    generation.script.padding = 100_000
    router = await start_router(context, generation, config=Config(request_timeout_s=0.5))
    async with router.post(STREAM, read_bufsize=1024) as response:
        await response.content.readuntil(b"\n\n")
        await generation.wait_fate("generation", "cancelled")
    await no_connections(router)


async def test_closed_idle_connection_is_replaced(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    await router.text(STREAM)
    for worker in (context, generation):  # a restart on the same port closes what was kept
        await worker.stop()
        await worker.start()
    assert await router.text(STREAM) == context.event("one") + generation.events(skip=1)


async def test_connection_is_used_again(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    for _ in range(5):
        await router.text(STREAM)
    assert [len(worker.client.connections) for worker in router.pool.workers] == [1, 1]


async def test_http_1_0_client_gets_an_unframed_stream(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    body = json.dumps(STREAM).encode()
    host, port = router.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    head, _, content = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
    writer.close()
    assert b"chunked" not in head.lower()
    assert content.decode() == context.event("one") + generation.events(skip=1)


async def test_many_at_once(start_router: StartRouter, context, spare_context, generation, spare_generation):
    router = await start_router(context, spare_context, generation, spare_generation)

    async def one(number: int) -> None:
        if number % 2:
            text = await router.text(STREAM)
            assert text.endswith("data: [DONE]\n\n")
            assert "one" in text
            assert '" four"' in text
        else:
            assert "one two three four" in await router.text(WHOLE)

    await asyncio.gather(*(one(number) for number in range(200)))
    await no_connections(router)
    assert await router.metric("total_responses_total") == 200
    workers: list[FakeWorker] = [context, spare_context]
    assert [len(worker.legs("context")) for worker in workers] == [100, 100]


async def test_max_retries_bounds_the_attempts(start_router: StartRouter, context, spare_context, generation):
    for worker in (context, spare_context):
        worker.script.fail["context"] = "mid_head"
    router = await start_router(context, spare_context, generation, config=Config(max_retries=0))
    assert await router.text(STREAM) == generation.events(skip=0)
    assert len(context.legs("context")) + len(spare_context.legs("context")) == 1


async def test_a_given_request_id_need_not_be_unique(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    await asyncio.gather(*(router.text(WHOLE, headers={"X-Request-ID": "same"}) for _ in range(3)))
    ids = {seen.body["disaggregated_params"]["disagg_request_id"] for seen in context.seen}
    assert len(ids) == 3
    assert {seen.headers["X-Request-ID"] for seen in context.seen} == {"same"}
