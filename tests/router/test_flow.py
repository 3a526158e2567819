"""The two legs through a real router and fake workers: what the client gets, what each worker was told."""

import asyncio
import json

import pytest

from tests.fakes.fake_worker import FakeWorker
from tests.router.conftest import STREAM, WHOLE, StartRouter, no_connections


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


async def test_a_given_request_id_need_not_be_unique(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    await asyncio.gather(*(router.text(WHOLE, headers={"X-Request-ID": "same"}) for _ in range(3)))
    ids = {seen.body["disaggregated_params"]["disagg_request_id"] for seen in context.seen}
    assert len(ids) == 3
    assert {seen.headers["X-Request-ID"] for seen in context.seen} == {"same"}
