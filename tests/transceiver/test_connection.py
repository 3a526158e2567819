"""Dialling an owner that is not there."""

import socket
from contextlib import ExitStack

import pytest

from diptych.errors import TransferError
from diptych.transceiver import connection
from diptych.transceiver.stop import Stop


def test_a_host_that_does_not_answer_is_given_up_before_the_fetch_is(monkeypatch):
    """A full backlog drops the handshake, as a network that loses everything does."""
    monkeypatch.setattr(connection, "CONNECT_S", 0.1)
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(TransferError, match="no answer within") as gone:
            connection.dial(full.getsockname(), "control", "incarnation", None, Stop(60.0))
    assert gone.value.code == "peer_gone"
