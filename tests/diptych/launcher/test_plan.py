import pytest

from diptych.config.disagg import disagg_config
from diptych.errors import ConfigError
from diptych.launcher import default_config, members


def plan(**data: object):
    return members(disagg_config({"model": "m", **data}, source="f.yaml"))


def test_default_is_one_of_each():
    assert [(member.name, member.role, member.port) for member in members(default_config())] == [
        ("ctx0", "CONTEXT", 0),
        ("gen0", "GENERATION", 0),
    ]


def test_instances_and_options():
    started = plan(
        max_batch_size=4,
        context_servers={"num_instances": 2, "kv_cache_config": {"max_tokens": 64}},
        generation_servers={"num_instances": 1},
    )
    assert [member.name for member in started] == ["ctx0", "ctx1", "gen0"]
    assert started[1].options == {"max_batch_size": 4, "kv_cache_config": {"max_tokens": 64}}
    assert started[2].options == {"max_batch_size": 4}


def test_addresses_are_kept():
    started = plan(
        context_servers={"urls": ["localhost:8001"]}, generation_servers={"urls": ["http://[::1]:8002"]}
    )
    assert [(member.host, member.port) for member in started] == [("localhost", 8001), ("::1", 8002)]


def test_a_worker_in_both_sections_is_started_once():
    section = {"urls": ["localhost:8001", "localhost:8002"]}
    started = plan(context_servers={"urls": ["localhost:8001"]}, generation_servers=section)
    assert [(member.name, member.role, member.port) for member in started] == [
        ("ctx0+gen0", "BOTH", 8001),
        ("gen1", "GENERATION", 8002),
    ]


def test_a_worker_in_both_sections_has_one_set_of_options():
    with pytest.raises(ConfigError, match="localhost:8001 is a context and a generation server"):
        plan(
            context_servers={"urls": ["localhost:8001"], "max_batch_size": 2},
            generation_servers={"urls": ["localhost:8001"]},
        )


def test_generation_alone_serves_aggregated():
    assert [member.role for member in plan(generation_servers={"num_instances": 1})] == ["GENERATION"]


def test_nothing_to_start():
    with pytest.raises(ConfigError, match="nothing to start"):
        plan()
    with pytest.raises(ConfigError, match="model is missing"):
        members(disagg_config({"context_servers": {}}, source="f.yaml"))
