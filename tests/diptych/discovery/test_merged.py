"""The configuration's list beside a registry."""

from diptych.discovery.merged import MergedRegistry
from diptych.discovery.static import StaticRegistry
from tests.diptych.discovery.conftest import Reader
from tests.diptych.discovery.test_conformance import worker

LISTED = "http://localhost:1"


async def test_the_registry_speaks_for_the_workers_it_has_named():
    other = StaticRegistry()
    merged = MergedRegistry(StaticRegistry.from_urls(["localhost:1"], ["localhost:2"]), other)
    reader = Reader(merged)
    await reader.until(LISTED, "http://localhost:2")
    lease = await other.register(worker("w:1-a", url="http://127.0.0.1:1"))
    await reader.until("w:1-a", "http://localhost:2")
    await lease.close()
    await reader.until("http://localhost:2")
    await reader.close()
    await merged.close()


async def test_the_list_counts_while_the_registry_says_nothing():
    class Silent(StaticRegistry):
        async def watch(self):
            for nothing in ():
                yield nothing

    merged = MergedRegistry(StaticRegistry.from_urls(["localhost:1"], []), Silent())
    assert [[info.url for info in shown] async for shown in merged.watch()] == [[LISTED]]
    await merged.close()


async def test_an_empty_list_waits_for_the_registry():
    other = StaticRegistry([worker()])
    merged = MergedRegistry(StaticRegistry(), other)
    assert await anext(merged.watch()) == (worker(),)
    await merged.close()
