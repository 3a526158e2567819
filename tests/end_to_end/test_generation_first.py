"""generation_first with real processes: kills and leaves in each phase, short pools, other chat templates."""

import asyncio
import secrets

import aiohttp
import orjson
import pytest
from mesh import mesh, wait_for

STORY = "a long story about the sea and the wind "
LONG = STORY * 110  # some 1000 tokens: three chunks
OPTIONS = {"num_threads": 1, "max_num_tokens": 384, "kv_cache_config": {"max_tokens": 4096}}
REST_S = 5.0  # a busy machine


class Pair:
    def __init__(self, started):
        self.context = started.worker("context", "CONTEXT", **OPTIONS)
        self.generation = started.worker("generation", "GENERATION", **OPTIONS)
        self.router = started.router(
            "router", [self.context], [self.generation], schedule_style="generation_first"
        )
        for server in self.servers:
            server.wait_ready()

    @property
    def servers(self):
        return self.context, self.generation, self.router

    def mend(self):
        for server in self.servers:
            if server.process.poll() is not None:
                server.start()
        for server in self.servers:
            server.wait_ready()

    def wait_rest(self, *workers):
        for worker in workers:
            wait_for(f"{worker.name} at rest", lambda worker=worker: is_at_rest(worker), REST_S)
            assert "not conserved" not in worker.log.read_text()

    def ahead(self):
        return self.generation.metric("diptych_kv_blocks_fetched_ahead_total")


def is_at_rest(worker):
    blocks = worker.blocks()
    return blocks["active"] == blocks["leased"] == 0


@pytest.fixture(scope="module")
def started_pair(small_model, tmp_path_factory):
    with mesh(tmp_path_factory.mktemp("early")) as started:
        yield Pair(started)


@pytest.fixture
def pair(started_pair):
    started_pair.mend()
    yield started_pair
    started_pair.mend()
    started_pair.wait_rest(started_pair.context, started_pair.generation)
    assert "Traceback" not in started_pair.router.log.read_text()


async def until(what, condition):
    await asyncio.to_thread(wait_for, what, condition, 30.0)


def open_session():
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))


async def stream(session, url, prompt, *, max_tokens=12, on_token=None):
    """The tokens of a streamed answer; each is told to `on_token` by its number."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    tokens, last = [], b""
    async with session.post(
        f"{url}/v1/completions", json={**body, "cache_salt": secrets.token_hex(4)}
    ) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            last = line[6:].strip()
            if last != b"[DONE]":
                event = orjson.loads(last)
                assert "error" not in event, event
                tokens += [token for choice in event["choices"] for token in choice["token_ids"]]
                if on_token is not None:
                    on_token(len(tokens))
    assert last == b"[DONE]"
    return tokens


async def leave(call):
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


@pytest.fixture
async def expected(pair):
    async with open_session() as session:
        return await stream(session, pair.context.url, LONG)


@pytest.mark.parametrize("who", ["context", "generation"])
async def test_killed_while_chunks_are_fetched_ahead(pair, expected, who):
    ahead = pair.ahead()
    async with open_session() as session:
        call = asyncio.create_task(stream(session, pair.router.url, LONG))
        await until("the first blocks", lambda: pair.ahead() > ahead)
        getattr(pair, who).kill()
        assert await call == expected


async def test_the_generation_worker_is_killed_in_the_middle_of_the_stream(pair, expected):
    def kill(number):
        if number == 5:
            pair.generation.kill()

    async with open_session() as session:
        assert await stream(session, pair.router.url, LONG, on_token=kill) == expected


async def test_the_engine_of_the_context_worker_dies_alone(pair, expected):
    """Its HTTP side is still there to answer 503; the generation worker sees the connection end."""
    ahead = pair.ahead()
    async with open_session() as session:
        call = asyncio.create_task(stream(session, pair.router.url, LONG))
        await until("the first blocks", lambda: pair.ahead() > ahead)
        pair.context.kill_engine()
        assert await call == expected
    await until("its HTTP side to end", lambda: pair.context.process.poll() is not None)


@pytest.mark.parametrize("paused", [None, "context", "generation"])
async def test_clients_that_leave_during_the_prefill(pair, paused):
    ahead = pair.ahead()
    async with open_session() as session:
        call = asyncio.create_task(stream(session, pair.router.url, LONG))
        await until("the first blocks", lambda: pair.ahead() > ahead)
        if paused:
            getattr(pair, paused).pause()
        await leave(call)
        if paused:
            other = pair.context if paused == "generation" else pair.generation
            pair.wait_rest(other)
            getattr(pair, paused).resume()
    pair.wait_rest(pair.context, pair.generation)


async def test_a_client_that_leaves_in_the_middle_of_the_stream(pair):
    reached = asyncio.Event()
    async with open_session() as session:
        call = asyncio.create_task(
            stream(
                session, pair.router.url, STORY, max_tokens=500, on_token=lambda n: n == 5 and reached.set()
            )
        )
        await reached.wait()
        await leave(call)
    pair.wait_rest(pair.context, pair.generation)


async def test_more_prompts_at_once_than_the_generation_workers_pool_can_hold(pair, expected):
    """4096 tokens of KV, 6 prompts of 1000: what does not fit ahead comes when it is its turn."""
    async with open_session() as session:
        answers = await asyncio.gather(*(stream(session, pair.router.url, LONG) for _ in range(6)))
    assert answers == [expected] * 6


async def test_a_generation_worker_that_makes_other_tokens_of_a_chat(pair, fresh):
    """The prompt is what the context worker says; the leg is sent again, with its tokens."""
    other = fresh.worker(
        "other", "GENERATION", chat_template="{{ 'other ' + messages[0].content }}", **OPTIONS
    )
    router = fresh.router("router", [pair.context], [other], schedule_style="generation_first")
    for server in (other, router):
        server.wait_ready()
    body = {"messages": [{"role": "user", "content": STORY * 30}], "temperature": 0, "max_tokens": 8}
    answers = []
    async with open_session() as session:
        for url in (pair.context.url, router.url):
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                assert response.status == 200
                answers.append((await response.json())["choices"])
    assert answers[0] == answers[1]
    assert router.metric("gen_retry_requests_total") == 1
    assert other.metric("diptych_handovers_total") == 0
