"""Routing by prefix on real processes: predictions against what the workers say that they found in their caches."""

import asyncio
import contextlib

import aiohttp
import pytest
from mesh import mesh, wait_for

DEADLINE_S = 60
WORDS = "the old harbour lay quiet under a pale sky while gulls turned slowly above the empty boats and nets "
BLOCK = 32
KV_AWARE = {"type": "kv_cache_aware"}


def urls(servers, **router):
    return {
        "urls": [f"127.0.0.1:{server.port}" for server in servers],
        "router": router or {"type": "round_robin"},
    }


@pytest.fixture(scope="module")
def servers(small_model, tmp_path_factory):
    """Two context and two generation workers with small caches, and routers that place both legs by prefix."""
    options = {"num_threads": 1, "kv_cache_config": {"max_tokens": 3200, "event_buffer_max_size": 1000}}
    with mesh(tmp_path_factory.mktemp("routing")) as started:
        context = [started.worker(f"context{number}", "CONTEXT", **options) for number in range(2)]
        generation = [started.worker(f"generation{number}", "GENERATION", **options) for number in range(2)]
        router = started.router(
            "router",
            context,
            generation,
            context_servers=urls(context, **KV_AWARE),
            generation_servers=urls(generation, type="load_balancing"),
        )
        conditional = started.router(
            "conditional",
            context,
            generation,
            context_servers=urls(context),
            generation_servers=urls(generation, **KV_AWARE),
            conditional_disagg_config={"max_local_prefill_length": 40},
        )
        plain = started.router("plain", context, generation)
        for server in (*context, *generation, router, conditional, plain):
            server.wait_ready()
        for server in (router, conditional):
            wait_until_synced(server, 2)
        yield {"context": context, "router": router, "conditional": conditional, "plain": plain}


def wait_until_synced(router, count):
    def synced():
        return sum(metric(router, "diptych_router_prefix_synced").values()) == count

    wait_for("the caches to be followed", synced, 20.0)


def metric(server, name):
    """Every value of a metric, by its labels."""
    from mesh import get

    text = get(f"{server.url}/prometheus/metrics") or ""
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return {line[len(name) : line.rindex(" ")]: float(line.rpartition(" ")[2]) for line in lines}


def counters(router, leg="context"):
    (tokens,) = [v for k, v in metric(router, "diptych_router_prefix_tokens_total").items() if leg in k] or [
        0.0
    ]
    (matched,) = [
        v for k, v in metric(router, "diptych_router_prefix_matched_total").items() if leg in k
    ] or [0.0]
    return tokens, matched


@pytest.fixture
async def session():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        yield session


async def ask(session, router, body, path="/v1/completions", headers=None):
    """The worker of the context leg (None: there was none), the tokens it found cached, and the answer."""
    body = {"max_tokens": 2, "temperature": 0, "ignore_eos": True, **body}
    async with session.post(router.url + path, json=body, headers=headers) as response:
        answer = await response.json()
        assert response.status == 200, answer
        usage = answer["usage"]
        return (
            response.headers.get("X-Diptych-Context-Worker"),
            usage["prompt_tokens_details"]["cached_tokens"],
            answer,
        )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_one_prefix_stays_on_one_worker_and_the_prediction_is_what_it_finds(servers, session, path):
    router = servers["router"]
    system = f"{path} " + WORDS * 12
    seen, predicted, found = set(), 0.0, 0
    for number in range(6):
        if path == "/v1/completions":
            body = {"prompt": f"{system} question {number}"}
        else:
            body = {
                "messages": [{"role": "system", "content": system}, {"role": "user", "content": str(number)}]
            }
        tokens_before, matched_before = counters(router)
        worker, cached, answer = await ask(session, router, body, path)
        tokens, matched = counters(router)
        assert tokens - tokens_before == answer["usage"]["prompt_tokens"]
        assert matched - matched_before == cached, f"request {number}: predicted, found"
        seen.add(worker)
        predicted, found = predicted + matched - matched_before, found + cached
    assert len(seen) == 1, seen
    assert found >= 5 * 6 * BLOCK


async def test_tokenized_by_the_router_or_by_the_worker_the_answer_is_the_same(servers, session):
    chat = [{"role": "user", "content": "Tell me about naïve cafés, 日本語 and 👩‍👩‍👧."}]
    for path, body in (
        ("/v1/chat/completions", {"messages": chat, "max_tokens": 8}),
        (
            "/v1/completions",
            {"prompt": ["One two three", "Stop here"], "n": 2, "echo": True, "max_tokens": 6},
        ),
        ("/v1/completions", {"prompt": "a b c d e f g", "truncate_prompt_tokens": 3, "max_tokens": 4}),
    ):
        _, _, plain = await ask(session, servers["plain"], body, path)
        _, _, placed = await ask(session, servers["router"], body, path)
        assert placed["choices"] == plain["choices"]
        assert placed["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


async def test_a_request_that_is_wrong_is_refused_by_the_worker_in_its_words(servers, session):
    for body in ({"prompt": "x", "max_tokens": 0}, {"prompt": ""}, {"promt": "x"}):
        answers = []
        for router in (servers["plain"], servers["router"]):
            async with session.post(f"{router.url}/v1/completions", json=body) as response:
                answers.append((response.status, (await response.json())["error"]))
        assert answers[0] == answers[1] and answers[0][0] == 400


async def test_a_salt_separates(servers, session):
    prompt = "salted " + WORDS * 8
    await ask(session, servers["router"], {"prompt": prompt, "cache_salt": "a"})
    _, before = counters(servers["router"])
    _, cached, _ = await ask(session, servers["router"], {"prompt": prompt, "cache_salt": "b"})
    _, after = counters(servers["router"])
    assert cached == 0 and after == before
    _, cached, _ = await ask(session, servers["router"], {"prompt": prompt, "cache_salt": "a"})
    assert cached > 0


async def test_a_hot_prefix_spills_when_its_worker_is_loaded(servers, session):
    prompt = "hot " + WORDS * 14
    await ask(session, servers["router"], {"prompt": prompt})
    calls = [
        ask(session, servers["router"], {"prompt": f"{prompt} {number}" + WORDS * 3, "max_tokens": 1})
        for number in range(24)
    ]
    answers = await asyncio.gather(*calls)
    workers = [worker for worker, _, _ in answers]
    counts = [workers.count(worker) for worker in set(workers)]
    assert len(counts) == 2 and min(counts) >= 6, counts


async def test_requests_that_come_at_once_with_a_new_prefix_share_it(servers, session):
    prompt = "sudden " + WORDS * 12
    answers = await asyncio.gather(*(ask(session, servers["router"], {"prompt": prompt}) for _ in range(3)))
    assert len({worker for worker, _, _ in answers}) == 1


async def test_what_was_evicted_is_no_longer_matched(servers, session):
    router = servers["router"]
    prompt = "soon forgotten " + WORDS * 12
    await ask(session, router, {"prompt": prompt})
    _, cached, _ = await ask(session, router, {"prompt": prompt})
    assert cached > 0
    # Six prompts of 47 blocks, three for each worker, push it out of caches of 100.
    fillers = [[number * 1000 + index % 900 for index in range(1500)] for number in range(1, 7)]
    await asyncio.gather(*(ask(session, router, {"prompt": tokens, "max_tokens": 1}) for tokens in fillers))
    before = counters(router)[1]
    _, cached, _ = await ask(session, router, {"prompt": prompt})
    assert cached == 0
    assert counters(router)[1] == before


async def test_sessions_stay_where_they_are(servers, session):
    homes = {}
    for name in ("x", "y", "z", "w", "v"):
        headers = {"X-Session-ID": name}
        homes[name] = {
            (await ask(session, servers["plain"], {"prompt": f"{name} says"}, headers=headers))[0]
            for _ in range(3)
        }
    assert all(len(workers) == 1 for workers in homes.values())
    assert len(set.union(*homes.values())) == 2


async def test_little_left_to_compute_needs_no_context_leg(servers, session):
    router = servers["conditional"]
    prompt = "local " + WORDS * 12
    worker, _, expected = await ask(session, router, {"prompt": prompt, "max_tokens": 6})
    assert worker is not None
    worker, cached, answer = await ask(session, router, {"prompt": prompt, "max_tokens": 6})
    assert worker is None and cached >= 6 * BLOCK
    assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
    worker, _, _ = await ask(session, router, {"prompt": prompt + WORDS * 4})
    assert worker is not None, "too much is left: a context leg computes it"
    worker, _, _ = await ask(session, router, {"prompt": "short"})
    assert worker is not None, "nothing matches: a context leg computes it, however short it is"
    assert router.metric("diptych_router_local_prefills_total") == 1


async def test_tensorrt_llms_block_events(servers, session):
    (worker,) = servers["context"][:1]
    async with session.post(f"{worker.url}/kv_cache_events") as response:
        events = await response.json()
    numbers = [event["event_id"] for event in events]
    assert numbers == sorted(numbers) and len(numbers) == len(set(numbers))
    stored = [block for event in events for block in event["data"].get("blocks", ())]
    assert stored and all(len(block["tokens"]) == BLOCK for block in stored)
    known = {block["block_hash"] for block in stored}
    parents = [event["data"]["parent_hash"] for event in events if event["data"]["type"] == "stored"]
    assert known & set(parents)


async def test_a_killed_workers_entries_vanish(fresh):
    context = [fresh.worker(f"context{number}", "CONTEXT", num_threads=1) for number in range(2)]
    generation = fresh.worker("generation", "GENERATION", num_threads=1)
    router = fresh.router("router", context, [generation], context_servers=urls(context, **KV_AWARE))
    for server in (*context, generation, router):
        server.wait_ready()
    wait_until_synced(router, 2)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        worker, _, _ = await ask(session, router, {"prompt": WORDS * 12})
        victim = next(server for server in context if server.url == worker)

        def held():
            return metric(router, "diptych_router_prefix_index_blocks")

        label = f'{{worker="{victim.url}"}}'
        await asyncio.to_thread(wait_for, "its blocks to be known", lambda: held().get(label, 0) >= 6, 10.0)
        victim.kill()
        await asyncio.to_thread(wait_for, "its blocks to be forgotten", lambda: label not in held(), 15.0)
        before = counters(router)[1]
        worker, cached, _ = await ask(session, router, {"prompt": WORDS * 12})
        assert worker != victim.url and cached == 0
        assert counters(router)[1] == before
        with contextlib.suppress(ProcessLookupError):
            victim.kill()
