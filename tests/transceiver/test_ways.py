"""A transport that was asked for must work; one that is merely installed may be left out, not silently."""

import logging

import pytest

from diptych.transceiver import transport
from diptych.transceiver.settings import FetchDone, FetchFailed


class Broken:
    def __init__(self, context) -> None:
        raise RuntimeError("libbroken.so: cannot open shared object file")


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(transport.TRANSPORTS, "broken", "diptych.transceiver.broken:Broken")
    monkeypatch.setattr(
        transport.importlib, "import_module", _import_broken(transport.importlib.import_module)
    )


def _import_broken(real):
    class Module:
        Broken = Broken

    return lambda name: Module if name == "diptych.transceiver.broken" else real(name)


def test_an_optional_one_is_left_out_with_the_reason(nodes, broken, caplog):
    with caplog.at_level(logging.WARNING, "diptych.transceiver.ways"):
        owner = nodes(seed=1, backends=("tcp",), optional_backends=("broken",))
    assert caplog.messages == [
        "KV transport broken is installed, but cannot be used here: libbroken.so: cannot open shared object file"
    ]
    reader = nodes(seed=2, backends=("tcp",))
    done = reader.result(reader.transceiver.fetch(owner.offer([1, 2])[1], range(2), [0, 1]))
    assert isinstance(done, FetchDone), done


def test_a_required_one_is_not(nodes, broken):
    with pytest.raises(RuntimeError, match="libbroken"):
        nodes(seed=1, backends=("broken",))


def test_fetches_beyond_the_tokens_in_flight_wait_for_their_turn(nodes):
    owner = nodes(seed=1, backends=("tcp",))
    reader = nodes(seed=2, backends=("tcp",), max_tokens_in_flight=1)
    ids = [reader.transceiver.fetch(owner.offer([block])[1], range(1), [block]) for block in range(5)]
    ids.append(reader.transceiver.fetch(owner.offer([6])[1], range(1), [6]))
    reader.transceiver.abort(ids[-1])
    ends = [reader.result(fetch_id) for fetch_id in ids]
    assert all(isinstance(end, FetchDone) for end in ends[:-1]), ends
    assert isinstance(ends[-1], FetchDone) or ends[-1] == FetchFailed(ids[-1], "cancelled", ends[-1].message)
    assert (reader.blocks[:5] == owner.blocks[:5]).all()
