"""API keys: in the configuration, at the public port, and in the line."""

import asyncio

import pytest

from diptych.config.api_keys import KeySetting, read_api_keys
from diptych.errors import ConfigError, Unauthorized
from diptych.router.api_keys import ApiKey, ApiKeys
from tests.router.conftest import Config, StartRouter

WHOLE = {"model": "fake", "prompt": "hello"}
KEYS = read_api_keys(["right", {"key": "other", "name": "team", "weight": 2}], source="test")


def test_keys_in_the_yaml():
    assert (KeySetting(key="right", name="key-0"), KeySetting(key="other", name="team", weight=2.0)) == KEYS
    assert "right" not in repr(KEYS)


def test_keys_in_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# comment\n\nplain\nheavy 2.5 the big team\n")
    assert read_api_keys(str(path), source="test") == (
        KeySetting(key="plain", name="key-0"),
        KeySetting(key="heavy", name="the big team", weight=2.5),
    )


def test_keys_in_the_environment(monkeypatch):
    monkeypatch.setenv("DIPTYCH_API_KEYS", "one, two,")
    assert [setting.key for setting in read_api_keys(None, source="test")] == ["one", "two"]
    assert read_api_keys(["three"], source="test")[0].key == "three"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "must be a list"),
        ("/no/such/file", "cannot read"),
        ([""], r"api_keys\[0\] must be a key"),
        (["a", {"name": "b"}], r"api_keys\[1\] must be a key"),
        ([{"key": "a", "weight": 0}], "weight"),
        ([{"key": "a", "wait": 1}], "wait"),
        (["a", "a"], "more than once"),
    ],
)
def test_keys_that_cannot_be(given, message):
    with pytest.raises(ConfigError, match=message):
        read_api_keys(given, source="test")


def test_check():
    keys = ApiKeys.from_settings(KEYS)
    assert keys.check("Bearer right") == ApiKey("key-0", 1.0)
    assert keys.check("bearer  other ") == ApiKey("team", 2.0)
    for wrong in (None, "", "right", "Basic right", "Bearer", "Bearer ", "Bearer rightt", "Bearer \udcff"):
        with pytest.raises(Unauthorized):
            keys.check(wrong)
    assert ApiKeys().check(None) == ApiKey("")


async def test_public_routes_need_a_key(start_router: StartRouter, context, generation):
    router = await start_router(context, generation, config=Config(api_keys=KEYS))
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        async with router.post(WHOLE, headers=headers) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        for path in ("/v1/models", "/cluster_info"):
            async with router.session.get(router.url + path, headers=headers) as response:
                assert response.status == 401
    assert context.seen == []
    right = {"Authorization": "Bearer right"}
    async with router.post(WHOLE, headers=right) as response:
        assert response.status == 200
    async with router.session.get(router.url + "/v1/models", headers=right) as response:
        assert response.status == 200
    for path in ("/health", "/live", "/version", "/metrics", "/prometheus/metrics"):
        async with router.session.get(router.url + path) as response:
            assert response.status == 200


async def test_a_greedy_key_waits_for_another(start_router: StartRouter, context, generation):
    """One request runs, twenty of one key wait; then one of another key comes: it is the second to be served."""
    gate = context.script.hold["context"] = asyncio.Event()
    config = Config(api_keys=KEYS, max_concurrent_requests=1, max_queued_requests=100)
    router = await start_router(context, generation, config=config)
    done: list[str] = []

    async def ask(key: str, name: str) -> None:
        async with router.post(WHOLE, headers={"Authorization": f"Bearer {key}"}) as response:
            assert response.status == 200
        done.append(name)

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(ask("right", "greedy"))
        await router.until(lambda: router.admission.waiting == 19)
        group.create_task(ask("other", "modest"))
        await router.until(lambda: router.admission.waiting == 20)
        gate.set()
    assert done.index("modest") <= 2
