"""Policies inside a running router: which worker the legs reach, and what happens without a tokenizer."""

import asyncio
import logging

import pytest

from tests.router.conftest import Config, Policy, Section


def config(context: str = "round_robin", generation: str = "round_robin", **options) -> Config:
    return Config(
        context_servers=Section(router=Policy(context, options)),
        generation_servers=Section(router=Policy(generation)),
    )


@pytest.mark.parametrize("policy", ["load_balancing", "kv_cache_aware"])
async def test_a_busy_worker_is_passed_over(start_router, context, spare_context, generation, policy):
    router = await start_router(context, spare_context, generation, config=config(policy))
    context.script.hold["context"] = spare_context.script.hold["context"] = asyncio.Event()
    first = asyncio.create_task(router.text({"prompt": "x"}))
    await router.until(lambda: len(context.seen) + len(spare_context.seen) == 1)
    second = asyncio.create_task(router.text({"prompt": "x"}))
    await router.until(lambda: len(context.seen) == len(spare_context.seen) == 1)
    context.script.hold["context"].set()
    await asyncio.gather(first, second)


async def test_without_a_tokenizer_it_goes_by_load_and_says_so_once(
    start_router, context, generation, caplog
):
    with caplog.at_level(logging.WARNING):
        router = await start_router(context, generation, config=config("kv_cache_aware", "kv_cache_aware"))
        for _ in range(3):
            await router.text({"prompt": "x"})
    warnings = [
        record.getMessage() for record in caplog.records if "goes by load alone" in record.getMessage()
    ]
    assert len(warnings) == 1
    assert all("prompt_token_ids" not in seen.body for seen in context.seen)


async def test_a_session_reaches_the_same_workers(
    start_router, context, spare_context, generation, spare_generation
):
    router = await start_router(context, spare_context, generation, spare_generation)
    reached = {}
    for session in ("a", "b", "c", "d", "e", "f"):
        before = [len(worker.seen) for worker in (context, spare_context, generation, spare_generation)]
        for _ in range(2):
            await router.text({"prompt": "x"}, headers={"X-Correlation-ID": session})
        after = [len(worker.seen) for worker in (context, spare_context, generation, spare_generation)]
        reached[session] = tuple(now - was for now, was in zip(after, before, strict=True))
    assert all(sorted(counts[:2]) == sorted(counts[2:]) == [0, 2] for counts in reached.values())
    assert len(set(reached.values())) > 1


async def test_a_leg_that_fails_is_no_load_any_more(start_router, context, spare_context, generation):
    settings = config("load_balancing", use_tokens=True)
    router = await start_router(context, spare_context, generation, config=settings)
    context.script.fail["context"] = "no_answer"
    for _ in range(4):
        assert "one" in await router.text({"prompt": "x"})
    assert all(worker.in_flight == 0 for worker in router.pool.workers)
