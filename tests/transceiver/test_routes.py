"""Each usable transport is measured once a peer; the fastest is tried first, and the log says so."""

import logging
import re

import pytest
from kv_nodes import LAYOUT

from diptych.transceiver.routes import Routes
from diptych.transceiver.settings import FetchDone
from diptych.transceiver.ticket import OwnerRank
from diptych.transceiver.transport import Unreachable


class FakeTransport:
    def __init__(self, name: str, speed: float | None) -> None:
        self.name = name
        self._speed = speed

    def connect(self, descriptor, stop):
        return descriptor

    def measure(self, peer, stop) -> float:
        if self._speed is None:
            raise Unreachable("it is far away")
        return self._speed


def rank(*names: str) -> OwnerRank:
    return OwnerRank(
        ticket_id="1",
        incarnation="it",
        layout=LAYOUT,
        fingerprint="",
        host="10.0.0.1",
        port=7,
        transports=dict.fromkeys(names, b""),
    )


def routes_of(speeds: dict[str, float | None], *, measure: bool = True) -> Routes:
    return Routes({name: FakeTransport(name, speed) for name, speed in speeds.items()}, measure=measure)


def settle(routes: Routes) -> None:
    routes._measuring.submit(lambda: None).result(5)


def test_the_fastest_comes_first_once_it_is_known(caplog):
    routes = routes_of({"a": 1.0, "b": 300.0, "c": None, "d": 2.0})
    owner = rank("a", "b", "c")
    assert routes.order(owner) == ["a", "b", "c"]
    with caplog.at_level(logging.INFO, "diptych.transceiver.routes"):
        routes.use(owner, "a", "it answers", [])
        settle(routes)
        routes.use(owner, "a", "it answers", [])
    assert routes.order(owner) == ["b", "a", "c"]
    assert [record.message for record in caplog.records] == [
        "KV transport to 10.0.0.1:7 = a, because it answers",
        "KV transport to 10.0.0.1:7 measured: b 300.0 GB/s, a 1.0",
    ]
    routes.forget("it")
    assert routes.order(owner) == ["a", "b", "c"]
    routes.close()


def test_what_is_as_fast_as_the_fastest_goes_by_the_order_of_the_settings():
    routes = routes_of({"a": 1.0, "b": 9.0, "c": 10.0})
    owner = rank("a", "b", "c")
    routes.use(owner, "a", "it answers", [])
    settle(routes)
    assert routes.order(owner) == ["b", "c", "a"]
    routes.close()


def test_a_peer_that_left_meanwhile_is_forgotten():
    routes = routes_of({"a": 1.0, "b": 2.0})
    routes.use(rank("a", "b"), "a", "it answers", [])
    routes.forget("it")
    settle(routes)
    routes.close()
    routes.use(rank("a", "b"), "a", "it answers", [])  # after the end nothing is measured


@pytest.mark.parametrize("remedy", [None, "move it"])
def test_a_way_that_should_work_is_a_warning_with_its_remedy(caplog, remedy):
    routes = routes_of({"a": 1.0, "b": 1.0}, measure=False)
    routes.detour(rank("a", "b"), "a", Unreachable("it is far away", remedy=remedy))
    routes.use(rank("a", "b"), "b", "it answers", ["a: it is far away"])
    routes.detour(rank("a", "b"), "a", Unreachable("it is far away", remedy=remedy))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == (
        ["KV transport to 10.0.0.1:7 cannot be a: it is far away; to use it, move it"] if remedy else []
    )


def test_two_engines_measure_each_other(nodes, caplog):
    owner, reader = nodes(seed=1), nodes(seed=2, measure_transports=True)
    with caplog.at_level(logging.INFO, "diptych.transceiver.routes"):
        assert isinstance(reader.result(reader.transceiver.fetch(owner.offer([4])[1], [0], [0])), FetchDone)
        settle(reader.transceiver._fetcher._routes)
    (line,) = [record.message for record in caplog.records if "measured" in record.message]
    assert re.search(r"(shm [\d.]+ GB/s, tcp [\d.]+|tcp [\d.]+ GB/s, shm [\d.]+)$", line)
