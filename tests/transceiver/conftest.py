"""Fixtures of the transceiver tests; what they make is in kv_nodes.py beside this file."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from conformance import WAYS
from kv_nodes import Gate, Node, Process, Way


@pytest.fixture
def nodes() -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def make(*args, **kwargs) -> Node:
        made.append(Node(*args, **kwargs))
        return made[-1]

    yield make
    for node in reversed(made):
        node.close()


@pytest.fixture
def processes() -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(*args: str) -> Process:
        made.append(Process(*args))
        return made[-1]

    yield make
    for process in made:
        process.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


@pytest.fixture(params=WAYS)
def transport(request) -> Way:
    """Each test that takes it runs over every transport."""
    way = request.param
    if way == "nixl" and way.device == "cuda" and "processes" not in request.fixturenames:
        pytest.skip("UCX does not connect two pools on GPUs within one process")
    return way
