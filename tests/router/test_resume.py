"""Streams that break off go on elsewhere: what the client gets, and what the next worker is told."""

import asyncio
import json

import pytest

from diptych.journal import END, Entry, journal_line, read_journal
from diptych.router.frontends.openai import parse_call, parse_prefill
from diptych.router.http1 import ChunkedBody, MalformedResponse
from diptych.router.settings import Limits
from tests.router.conftest import FAST, STREAM, Config, StartRouter, last_event, no_connections


def texts(stream: str) -> list[str]:
    events = [event.removeprefix("data: ") for event in stream.split("\n\n")[:-1]]
    assert events[-1] == "[DONE]"
    return [json.loads(event)["text"] for event in events[:-1]]


ALL = ["one", " two", " three", " four"]


@pytest.fixture
async def broken(start_router: StartRouter, context, generation, spare_generation):
    """A router whose first generation worker breaks off after one token of each stream."""
    generation.script.fail["generation"] = "mid_body"
    return await start_router(context, generation, spare_generation)


@pytest.mark.parametrize("failure", ["mid_body", "mid_chunk"])
async def test_a_broken_stream_goes_on_after_the_last_whole_chunk(
    broken, context, generation, spare_generation, failure
):
    generation.script.fail["generation"] = failure
    for _ in range(2):  # round robin: one of them meets the bad worker first
        assert texts(await broken.text(STREAM)) == ALL
    (resumed,) = [
        leg.body["disaggregated_params"]
        for leg in spare_generation.legs("generation")
        if len(leg.body["disaggregated_params"]["choices"][0]["first_gen_tokens"]) > 1
    ]
    first = generation.legs("generation")[0].body["disaggregated_params"]
    (choice,) = resumed["choices"]
    assert choice["first_gen_tokens"] == [42, 43]
    assert "ticket_id" not in choice
    assert "encoded_opaque_state" not in choice
    same = ("response_id", "created", "disagg_request_id", "seed", "request_type")
    assert {name: resumed[name] for name in same} == {name: first[name] for name in same}
    assert await broken.metric("gen_resumed_streams_total") == 1
    await context.wait_for(lambda: context.released)
    await no_connections(broken)


async def test_a_context_worker_finishes_a_broken_stream(start_router: StartRouter, context, generation):
    generation.script.fail["generation"] = "mid_body"
    router = await start_router(context, generation)
    text = await router.text(STREAM)
    assert texts(text) == ALL
    assert text.endswith(context.events(skip=2))


async def test_a_stream_breaks_more_than_once(
    start_router: StartRouter, context, spare_context, generation, spare_generation
):
    for worker in (spare_context, generation, spare_generation):
        worker.script.fail["generation"] = "mid_body"
    router = await start_router(context, spare_context, generation, spare_generation)
    for _ in range(4):
        assert texts(await router.text(STREAM)) == ALL


async def test_a_broken_whole_request_goes_on(
    start_router: StartRouter, context, generation, spare_generation
):
    generation.script.fail["whole"] = "mid_body"
    spare_generation.script.fail["whole"] = "mid_body"
    router = await start_router(context, generation, spare_generation)
    await context.stop()
    assert texts(await router.text(STREAM)) == ALL
    (whole,) = (*generation.legs("whole"), *spare_generation.legs("whole"))
    (resumed,) = (*generation.legs("generation"), *spare_generation.legs("generation"))
    assert resumed.body["disaggregated_params"]["choices"] == [
        {"request_type": "generation_only", "first_gen_tokens": [42]}
    ]
    params = whole.body["disaggregated_params"]
    assert resumed.body["disaggregated_params"]["response_id"] == params["response_id"]
    assert resumed.body["disaggregated_params"]["seed"] == params["seed"]


async def test_a_stream_that_broke_after_its_end_is_complete(
    start_router: StartRouter, context, generation, spare_generation
):
    generation.script.fail["generation"] = "after_end"
    spare_generation.script.fail["generation"] = "after_end"
    router = await start_router(context, generation, spare_generation)
    assert texts(await router.text(STREAM)) == ALL
    assert len(generation.legs("generation")) + len(spare_generation.legs("generation")) == 1


async def test_a_silent_stream_goes_on_elsewhere(start_router: StartRouter, context, generation):
    generation.script.hold_after[2] = asyncio.Event()
    limits = Limits(idle_s=0.2, probe_retry_s=FAST.probe_retry_s)
    router = await start_router(context, generation, limits=limits)
    assert texts(await router.text(STREAM)) == ALL
    await generation.wait_fate("generation", "cancelled")


async def test_a_hung_worker_is_found_by_its_probes(start_router: StartRouter, context, generation):
    """It takes connections and answers nothing, before and in the middle of streams."""
    gate = generation.script.hold_after[2] = asyncio.Event()
    generation.script.hold["generation"] = asyncio.Event()
    limits = Limits(probe_s=0.1, probe_interval_s=0.05, probe_retry_s=0.05, probe_retry_max_s=0.1)
    router = await start_router(context, generation, limits=limits)
    waiting = asyncio.create_task(router.text(STREAM))
    await generation.wait_for(lambda: generation.legs("generation"))
    generation.script.hold.clear()
    streaming = asyncio.create_task(router.text(STREAM))
    await generation.wait_for(lambda: len(generation.legs("generation")) == 2)
    generation.hangs = True
    assert [texts(text) for text in await asyncio.gather(waiting, streaming)] == [ALL, ALL]
    (worker,) = (w for w in router.pool.workers if w.worker_id == generation.url)
    assert worker.state == "DOWN"
    generation.hangs = False
    gate.set()
    assert await router.pool.wait_until(lambda pool: worker.ready, 5.0)
    assert worker.allowance == 1
    assert texts(await router.text(STREAM)) == ALL
    assert worker.allowance == 2


async def test_another_incarnation_cuts_what_runs_on_the_old_one(
    start_router: StartRouter, context, generation
):
    generation.script.hold_after[2] = asyncio.Event()
    limits = Limits(probe_interval_s=0.05, probe_retry_s=0.05)
    router = await start_router(context, generation, limits=limits)
    async with router.streaming(2) as response:
        generation.script.hold_after.clear()  # for who comes next: the leg that runs waits on
        generation.incarnation = "2"
        rest = (await response.read()).decode()
    assert texts(rest) == ALL[2:]
    await generation.wait_fate("generation", "cancelled")


async def test_a_begun_stream_waits_for_somebody_to_come_back(start_router: StartRouter, context, generation):
    router = await start_router(context, generation)
    gate = generation.script.hold_after[2] = asyncio.Event()
    async with router.streaming(2) as response:
        await context.stop()
        await generation.stop()
        await router.until(lambda: not any(worker.ready for worker in router.pool.workers))
        gate.set()
        await generation.start()
        assert texts((await response.read()).decode()) == ALL[2:]


async def test_resumes_are_bounded_and_the_error_is_told(start_router: StartRouter, context, generation):
    for worker in (context, generation):
        worker.script.fail["generation"] = "before_body"
        worker.script.tokens = [str(number) for number in range(100)]
    limits = Limits(probe_retry_s=0.01, resume_wait_s=2.0)
    router = await start_router(context, generation, limits=limits, config=Config(max_retries=1))
    text = await router.text(STREAM)
    assert last_event(text)["error"]["code"] == "worker_lost"
    legs = len(generation.legs("generation")) + len(context.legs("generation"))
    assert 2 <= legs <= 10
    await context.wait_for(lambda: context.released)


async def test_a_draining_worker_is_no_error(broken, generation, spare_generation):
    generation.script.answer["generation"] = (503, {"error": {"message": "draining"}}, {"Retry-After": "1"})
    generation.script.state = "DRAINING"
    for _ in range(2):
        assert texts(await broken.text(STREAM)) == ALL
    (worker,) = (w for w in broken.pool.workers if w.worker_id == generation.url)
    assert await broken.pool.wait_until(lambda pool: worker.state == "DRAINING", 5.0)


def call(body: dict, path="/v1/completions"):
    raw = json.dumps(body).encode()
    return parse_call(path, {}, raw, request_id="r", unique_id="u", arrived=0.0, timeout_s=1.0)


def test_the_seed_is_the_clients_or_one_for_all_legs():
    given = call({"prompt": "x", "seed": 7})
    assert "seed" not in json.loads(given.context_body())["disaggregated_params"]
    drawn = call({"prompt": "x", "seed": None})
    seeds = [
        json.loads(body)["disaggregated_params"]["seed"]
        for body in (drawn.context_body(), drawn.whole_body())
    ]
    assert seeds[0] == seeds[1] != call({"prompt": "x"}).seed


def test_each_choice_goes_on_from_its_own_tokens():
    prefill = parse_prefill(
        json.dumps(
            {
                "choices": [
                    {
                        "disaggregated_params": {
                            "first_gen_tokens": [n],
                            "ticket_id": f"t{n}",
                            "cached_tokens": 5,
                        }
                    }
                    for n in range(3)
                ],
                "prompt_token_ids": [[1, 2]],
            }
        ).encode()
    )
    journal = journal_line([Entry(n) for n in range(3)]) + journal_line(
        [Entry(0, [7]), Entry(2, [8], None, "stop", 8)]
    )
    body = json.loads(call({"prompt": "x"}).resumed_body(prefill, read_journal(journal)))
    assert body["prompt_token_ids"] == [[1, 2]]
    first, second, third = body["disaggregated_params"]["choices"]
    assert first == {"first_gen_tokens": [0, 7], "cached_tokens": 5}
    assert second == {"first_gen_tokens": [1], "ticket_id": "t1", "cached_tokens": 5}
    assert third == {
        "first_gen_tokens": [2, 8],
        "cached_tokens": 5,
        "finish_reason": "stop",
        "stop_reason": 8,
    }


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_journal_lines_are_taken_out_wherever_reads_end(size):
    data = chunked(b": 0=1\ndata: a\n\n", b": 0=2\n", b": 0=3\ndata: b\n\n", END + b"data: [DONE]\n\n")
    data += b"0\r\n\r\n"
    body = ChunkedBody()
    body.journal = bytearray()
    payload = b"".join(body.feed(data[i : i + size]) for i in range(0, len(data), size))
    assert payload == b"data: a\n\ndata: b\n\ndata: [DONE]\n\n"
    assert bytes(body.journal) == b": 0=1\n: 0=2\n: 0=3\n: end\n"
    assert body.done
    assert not body.excess


def test_what_a_broken_read_brought_does_not_count():
    body = ChunkedBody()
    body.journal = bytearray()
    with pytest.raises(MalformedResponse):
        body.feed(chunked(b": 0=1\ndata: a\n\n") + b"zz\r\n")
    assert body.journal == b""
