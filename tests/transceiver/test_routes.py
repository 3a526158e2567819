"""Each usable transport is measured for each peer; one that is clearly faster comes first, and the log says so."""

import logging
import re

import pytest
from kv_nodes import LAYOUT

from diptych.transceiver.routes import Routes
from diptych.transceiver.settings import FetchDone
from diptych.transceiver.ticket import OwnerRank
from diptych.transceiver.transport import Unreachable, fastest


class FakeTransport:
    """Measured at one speed after the other, and at the last one from then on; None: it reaches nobody."""

    def __init__(self, name: str, speeds: list[float | None]) -> None:
        self.name = name
        self.speeds = speeds
        self.measured = 0

    def connect(self, descriptor, stop):
        return descriptor

    def measure(self, peer, stop) -> float:
        speed = self.speeds[min(self.measured, len(self.speeds) - 1)]
        self.measured += 1
        if speed is None:
            raise Unreachable("it is far away")
        return speed


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


def routes_of(speeds: dict[str, float | list[float] | None], *, measure: bool = True) -> Routes:
    fakes = {
        name: FakeTransport(name, speed if isinstance(speed, list) else [speed])
        for name, speed in speeds.items()
    }
    return Routes(fakes, measure=measure, again_s=0.0)


def settle(routes: Routes) -> None:
    routes._measuring.submit(lambda: None).result(5)


def order_of(speeds: dict[str, float | list[float] | None]) -> list[str]:
    """After the first fetch and what it made measure."""
    routes, owner = routes_of(speeds), rank(*speeds)
    routes.use(owner, next(iter(speeds)), "it answers", [])
    settle(routes)
    order = routes.order(owner)
    routes.close()
    return order


def test_what_is_clearly_faster_comes_first_once_it_is_known(caplog):
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
        "KV transport to 10.0.0.1:7 measured: a 1.0 GB/s, b 300.0 GB/s; b comes first",
    ]
    routes.forget("it")
    assert routes.order(owner) == ["a", "b", "c"]
    routes.close()


@pytest.mark.parametrize(
    ("speeds", "order"),
    [
        ({"shm": 5.5, "tcp": 1.3}, ["shm", "tcp"]),
        ({"shm": 0.9, "tcp": 1.3}, ["shm", "tcp"]),  # faster, not clearly
        ({"shm": [0.4, 5.5], "tcp": 1.3}, ["shm", "tcp"]),  # a core was busy
        ({"shm": [0.4, 0.5], "tcp": 1.3}, ["tcp", "shm"]),  # clearly, twice
        ({"tcp": 1.0, "nixl": 9.0, "ucx": 10.0}, ["nixl", "tcp", "ucx"]),  # the first of the fast ones
        ({"shm": None, "tcp": 1.3}, ["tcp", "shm"]),  # what cannot be measured is tried last
        ({"shm": None, "tcp": None}, ["shm", "tcp"]),
    ],
)
def test_the_configured_order_holds_until_another_is_clearly_faster_twice(speeds, order):
    assert order_of(speeds) == order


def test_nothing_surprising_is_measured_once():
    routes, owner = routes_of({"shm": 5.5, "tcp": 1.3}), rank("shm", "tcp")
    routes.use(owner, "shm", "it answers", [])
    settle(routes)
    assert [fake.measured for fake in routes._transports.values()] == [1, 1]
    routes.close()


class FakeTransfer:
    bytes = 10_000_000

    def __init__(self, clock: "FakeClock", seconds: float) -> None:
        self._clock = clock
        self.seconds = seconds

    def wait(self) -> None:
        self._clock.now += self.seconds


class FakeClock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "expected", "copies"),
    [
        ([0.02, 0.01, 0.005, 0.001], 2.0, 3),  # slow ones: three, the best counts
        ([0.003] * 2 + [0.001] * 9, 10.0, 6),  # fast ones: for ten milliseconds
        ([1e-6] * 50, 10_000.0, 50),  # and no more than fifty
    ],
)
def test_a_measurement_is_the_best_of_several_copies(seconds, expected, copies):
    clock, left = FakeClock(), list(seconds)
    assert fastest(lambda: FakeTransfer(clock, left.pop(0)), clock) == pytest.approx(expected)
    assert len(seconds) - len(left) == copies


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
    assert re.search(r"measured: shm [\d.]+ GB/s, tcp [\d.]+ GB/s; (shm|tcp) comes first$", line)
