import socket

import pytest

from diptych.errors import StartupError
from diptych.listen import open_listener


def test_port_zero_takes_a_free_one():
    with open_listener("localhost", 0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with socket.create_connection((host, port), timeout=5):
            pass


def test_port_in_use_is_named():
    with open_listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(StartupError, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is in use"):
            open_listener("127.0.0.1", port)


def test_foreign_address():
    with pytest.raises(StartupError, match=r"192\.0\.2\.1 is not an address of this machine"):
        open_listener("192.0.2.1", 0)


def test_unknown_host():
    with pytest.raises(StartupError, match=r"cannot listen on no-such-host\.invalid:1"):
        open_listener("no-such-host.invalid", 1)


def test_inherited_listener():
    with open_listener("localhost", 0) as first:
        adopted = open_listener("ignored", 0, fd=first.detach())
    with adopted:
        assert adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_inherited_descriptor_that_is_no_listener():
    with socket.socket() as idle, pytest.raises(StartupError, match="does not listen"):
        open_listener("ignored", 0, fd=idle.detach())
    with pytest.raises(StartupError, match="file descriptor 4000 is not a socket"):
        open_listener("ignored", 0, fd=4000)
