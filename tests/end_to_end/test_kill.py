"""kill -9 of a worker: the client has the whole answer or one typed error, and the next request works."""

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import orjson
from mesh import wait_for

PROMPT = "a long story about the sea and the wind "
DEADLINE_S = 60


async def complete(session, url, **fields):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        return response.status, await response.json()


def pair(fresh):
    context, generation = fresh.worker("context", "CONTEXT"), fresh.worker("generation", "GENERATION")
    router = fresh.router("router", [context], [generation])
    for server in (context, generation, router):
        server.wait_ready()
    return context, generation, router


async def test_context_worker_killed_during_a_prefill(fresh):
    context, _generation, router = pair(fresh)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        _, expected = await complete(session, router.url)
        call = asyncio.create_task(complete(session, router.url, prompt=PROMPT * 700))
        await asyncio.to_thread(
            wait_for, "the prefill to run", lambda: context.metric("trtllm_num_requests_running") == 1, 20.0
        )
        context.kill()
        status, answer = await call
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 8
        status, answer = await complete(session, router.url)
        assert status == 200 and answer["choices"][0]["text"] == expected["choices"][0]["text"]


async def test_generation_worker_killed_during_a_stream(fresh):
    """The context worker goes on with it (faults/ has the whole suite)."""
    _context, generation, router = pair(fresh)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        _, expected = await complete(session, router.url)
        body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
        _, whole = await complete(session, router.url, max_tokens=60)
        events = []
        async with session.post(f"{router.url}/v1/completions", json=body) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: "):
                    events.append(line[6:].strip())
                if len(events) == 5:
                    generation.kill()
        assert events.pop() == b"[DONE]"
        text = "".join(orjson.loads(event)["choices"][0]["text"] for event in events)
        assert text == whole["choices"][0]["text"]
        status, answer = await complete(session, router.url)
        assert status == 200 and answer["choices"][0]["text"] == expected["choices"][0]["text"]


async def test_the_engine_process_dies_and_the_worker_says_so(fresh):
    worker = fresh.worker("worker").wait_ready()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        call = asyncio.create_task(complete(session, worker.url, max_tokens=2000))
        await asyncio.to_thread(
            wait_for, "the request to run", lambda: worker.metric("trtllm_num_requests_running") == 1, 20.0
        )
        engine = _child_of(worker.process.pid)
        os.kill(engine, signal.SIGKILL)
        status, answer = await call
    assert status == 503 and "engine process" in answer["error"]["message"]
    assert worker.process.wait(10) == 1
    assert "engine process ended" in worker.tail()


def _child_of(pid):
    (task,) = Path(f"/proc/{pid}/task").glob(f"{pid}/children")
    (child,) = task.read_text().split()
    return int(child)
