"""schedule_style generation_first: both legs at once, and what happens when one of them fails."""

import asyncio

import pytest

from tests.router.conftest import STREAM, WHOLE, Config, StartRouter, last_event, no_connections

EARLY = Config(schedule_style="generation_first")


@pytest.fixture(autouse=True)
def endpoints(context):
    context.kv_endpoint = "127.0.0.1:7000/c0"


def early_legs(worker):
    return [leg for leg in worker.legs("generation") if "choices" not in leg.body["disaggregated_params"]]


def late_legs(worker):
    return [leg for leg in worker.legs("generation") if "choices" in leg.body["disaggregated_params"]]


async def test_both_legs_are_sent_at_once(start_router: StartRouter, context, generation):
    gate = context.script.hold["context"] = asyncio.Event()
    router = await start_router(context, generation, config=EARLY)
    call = asyncio.create_task(router.text(STREAM, headers={"X-Request-ID": "abc"}))
    await generation.wait_fate("generation", "done")  # all its bytes wait for the context leg's
    gate.set()
    assert await call == context.event("one") + generation.events(skip=1)
    (first,), (second,) = context.seen, generation.seen
    told, params = (seen.body["disaggregated_params"] for seen in (first, second))
    assert told["request_type"] == "context_only" and params["request_type"] == "generation_only"
    assert params["ctx_info_endpoint"] == context.kv_endpoint
    for name in ("disagg_request_id", "response_id", "created", "seed", "schedule_style"):
        assert told[name] == params[name]
    assert params["schedule_style"] == "generation_first"
    assert second.headers["X-Request-ID"] == "abc"
    await no_connections(router)
    assert context.released == context.revoked == []


@pytest.mark.parametrize("journaled", [True, False])
async def test_of_an_early_stream_the_router_holds_little(
    start_router: StartRouter, context, generation, journaled
):
    gate = context.script.hold["context"] = asyncio.Event()
    generation.script.padding, generation.script.keeps_journal = 1 << 18, journaled
    router = await start_router(context, generation, config=EARLY)
    call = asyncio.create_task(router.text(STREAM))
    await generation.wait_for(lambda: generation.seen)
    (client,) = (worker.client for worker in router.pool.workers if worker.worker_id == generation.url)

    async def until_the_leg_is_not_read() -> None:
        while all(c.transport.is_reading() for c in client.connections if c.exchange is not None):
            await asyncio.sleep(0)

    await asyncio.wait_for(until_the_leg_is_not_read(), 30)
    gate.set()
    assert await call == context.event("one") + generation.events(skip=1)
    await no_connections(router)


async def test_a_whole_answer(start_router: StartRouter, context, generation):
    router = await start_router(context, generation, config=EARLY)
    assert "one two three four" in await router.text(WHOLE)
    assert [len(early_legs(generation)), len(late_legs(generation))] == [1, 0]
    assert await router.metric("gen_completed_requests_total") == 1
    assert context.released == []


async def test_the_first_token_does_not_wait_for_the_generation_leg(
    start_router: StartRouter, context, generation
):
    gate = generation.script.hold["generation"] = asyncio.Event()
    router = await start_router(context, generation, config=EARLY)
    async with router.post(STREAM) as response:
        assert await response.content.readuntil(b"\n\n") == context.event("one").encode()
        gate.set()
        assert (await response.read()).decode() == generation.events(skip=1)


async def test_each_worker_counts_the_leg_once_and_only_while_it_runs(
    start_router: StartRouter, context, generation
):
    gate = context.script.hold["context"] = asyncio.Event()
    rest = generation.script.hold_after[2] = asyncio.Event()
    router = await start_router(context, generation, config=EARLY)
    in_flight = {worker.worker_id: worker for worker in router.pool.workers}
    call = asyncio.create_task(router.text(STREAM))
    await context.wait_for(lambda: context.seen)
    await generation.wait_for(lambda: generation.seen)
    assert [in_flight[url].in_flight for url in (context.url, generation.url)] == [1, 1]
    gate.set()
    await context.wait_fate("context", "done")
    await router.until(lambda: in_flight[context.url].in_flight == 0)
    assert in_flight[generation.url].in_flight == 1
    rest.set()
    await call
    await no_connections(router)


@pytest.mark.parametrize("stream", [False, True])
async def test_finished_on_the_context_leg_ends_the_early_one(
    start_router: StartRouter, context, generation, stream
):
    context.script.finish_on_context = True
    generation.script.hold["generation"] = asyncio.Event()
    context.script.hold["context"] = asyncio.Event()
    router = await start_router(context, generation, config=EARLY)
    call = asyncio.create_task(router.text({**WHOLE, "stream": stream}))
    await generation.wait_for(lambda: generation.seen)
    context.script.hold["context"].set()
    assert "one" in await call
    await generation.wait_fate("generation", "cancelled")
    await no_connections(router)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_a_refused_early_leg_is_sent_again_with_the_ticket(
    start_router: StartRouter, context, generation, spare_generation, status, stream
):
    generation.script.answer["generation"] = (status, {"error": {"message": "no"}}, {})
    router = await start_router(context, generation, spare_generation, config=EARLY)
    for _ in range(2):
        assert '" four"' in (text := await router.text({**WHOLE, "stream": stream})) or "four" in text
    assert len(early_legs(generation)) + len(early_legs(spare_generation)) == 2
    assert await router.metric("gen_retry_requests_total") >= 1


async def test_a_worker_that_could_not_follow_may_get_the_leg_with_its_ticket(
    start_router: StartRouter, context, generation
):
    gate = context.script.hold["context"] = asyncio.Event()
    generation.script.answer["generation"] = (503, {"error": {"message": "the KV owner is gone"}}, {})
    router = await start_router(context, generation, config=EARLY)
    call = asyncio.create_task(router.text(STREAM))
    await generation.wait_fate("generation", "done")
    generation.script.answer.clear()
    gate.set()
    assert await call == context.event("one") + generation.events(skip=1)
    assert late_legs(generation)[0].body["disaggregated_params"]["choices"][0]["ticket_id"] == "c0-ticket-1"
    await context.wait_for(lambda: context.released)


@pytest.mark.parametrize("failure", ["no_answer", "mid_head", "before_body"])
async def test_a_dead_generation_worker_costs_only_the_time_saved(
    start_router: StartRouter, context, generation, spare_generation, failure
):
    generation.script.fail["generation"] = failure
    router = await start_router(context, generation, spare_generation, config=EARLY)
    for _ in range(2):
        assert await router.text(STREAM) == context.event("one") + spare_generation.events(skip=1)
    await no_connections(router)


@pytest.mark.parametrize("failure", ["mid_body", "mid_chunk"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_early_stream_that_breaks_goes_on_elsewhere(
    start_router: StartRouter, context, generation, failure, when
):
    """Before or after the context leg has answered; what had come by then is not lost."""
    generation.script.fail["generation"] = failure
    gate = context.script.hold["context"] = asyncio.Event()
    router = await start_router(context, generation, config=EARLY)
    call = asyncio.create_task(router.text(STREAM))
    if when == "before":
        await generation.wait_fate("generation", "cancelled")
    gate.set()
    text = await call
    assert text == context.event("one") + generation.event(" two") + context.events(skip=2)
    (resumed,) = late_legs(context)
    assert resumed.body["disaggregated_params"]["choices"][0]["first_gen_tokens"] == [42, 43]
    assert await router.metric("gen_resumed_streams_total") == 1
    await no_connections(router)


@pytest.mark.parametrize("failure", ["no_answer", "mid_head", "refuses"])
async def test_a_failed_context_leg_takes_the_early_leg_with_it(
    start_router: StartRouter, context, spare_context, generation, failure
):
    """The early leg follows the worker that failed: the request goes on in the other order."""
    spare_context.kv_endpoint = "127.0.0.1:7001/c1"
    generation.script.hold["generation"] = asyncio.Event()
    if failure == "refuses":
        context.script.answer["context"] = (503, {"error": {"message": "draining"}}, {})
    else:
        context.script.fail["context"] = failure
    router = await start_router(context, spare_context, generation, config=EARLY)
    calls = [asyncio.create_task(router.text(STREAM)) for _ in range(2)]
    await generation.wait_for(lambda: len(late_legs(generation)) == 1)
    generation.script.hold["generation"].set()
    for call in calls:
        assert await call == spare_context.event("one") + generation.events(skip=1)
    await no_connections(router)


async def test_without_context_workers_one_worker_does_it_all(start_router: StartRouter, context, generation):
    router = await start_router(context, generation, config=EARLY)
    await context.stop()
    assert await router.text(STREAM) == generation.events(skip=0)
    await no_connections(router)


async def test_an_error_of_the_context_leg_is_the_clients(start_router: StartRouter, context, generation):
    generation.script.hold["generation"] = asyncio.Event()
    content = {"error": {"message": "bad", "type": "t", "param": "p", "code": "c"}}
    context.script.answer["context"] = (400, content, {})
    router = await start_router(context, generation, config=EARLY)
    async with router.post(WHOLE) as response:
        assert response.status == 400 and await response.json() == content
    await no_connections(router)


@pytest.mark.parametrize("hung", ["context", "generation", "both"])
async def test_hung_workers_end_in_504(start_router: StartRouter, context, generation, hung):
    for leg, worker in (("context", context), ("generation", generation)):
        if hung in (leg, "both"):
            worker.script.fail[leg] = "hang"
    config = Config(schedule_style="generation_first", request_timeout_s=0.3)
    router = await start_router(context, generation, config=config)
    async with router.post(WHOLE) as response:
        assert response.status == 504
    await no_connections(router)


async def test_a_client_that_leaves_during_the_prefill_ends_both_legs(
    start_router: StartRouter, context, generation
):
    generation.script.hold["generation"] = asyncio.Event()
    router = await start_router(context, generation, config=EARLY)
    request = await router.held(STREAM, context, "context")
    await generation.wait_for(lambda: generation.seen)
    request.cancel()
    await context.wait_fate("context", "cancelled")
    await generation.wait_fate("generation", "cancelled")
    await context.wait_for(lambda: len(context.revoked) == 1)
    await no_connections(router)


async def test_a_client_that_leaves_after_the_first_token_ends_the_early_leg(
    start_router: StartRouter, context, generation
):
    generation.script.hold["generation"] = asyncio.Event()
    router = await start_router(context, generation, config=EARLY)
    async with router.streaming(1) as response:
        response.close()
    await generation.wait_fate("generation", "cancelled")
    await context.wait_for(lambda: context.released == ["c0-ticket-1"])
    await no_connections(router)


@pytest.mark.parametrize("reason", ["no endpoint", "no generation worker"])
async def test_who_cannot_follow_gets_the_leg_afterwards(
    start_router: StartRouter, context, generation, reason
):
    if reason == "no endpoint":
        context.kv_endpoint = ""
    router = await start_router(context, generation, config=EARLY)
    if reason == "no generation worker":
        for worker in router.pool.workers:
            if worker.worker_id == generation.url:
                worker.facts = None  # down
    assert "one" in await router.text(STREAM)
    assert not [leg for leg in (*context.seen, *generation.seen) if "ctx_info_endpoint" in str(leg.body)]
    assert "schedule_style" not in str(context.seen[0].body)


async def test_an_early_leg_that_fails_late_and_nobody_else_ends_in_an_error_event(
    start_router: StartRouter, context, generation
):
    error = {"error": {"message": "gone", "type": "internal_error", "param": None, "code": None}}
    generation.script.answer["generation"] = (500, error, {})
    context.script.answer["generation"] = (500, error, {})
    router = await start_router(context, generation, config=EARLY)
    assert last_event(await router.text(STREAM)) == error
    await context.wait_for(lambda: context.released == ["c0-ticket-1"])


async def test_many_at_once(start_router: StartRouter, context, spare_context, generation, spare_generation):
    spare_context.kv_endpoint = "127.0.0.1:7001/c1"
    router = await start_router(context, spare_context, generation, spare_generation, config=EARLY)
    texts = await asyncio.gather(*(router.text({**WHOLE, "stream": n % 2 == 0}) for n in range(100)))
    assert all("four" in text for text in texts)
    await no_connections(router)
    assert not late_legs(generation) and not late_legs(spare_generation)
