"""Ports for the servers that tests start, also when several test runs share a machine."""

import contextlib
import os
import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 10240


def free_port() -> int:
    """A port of the loopback that stays the caller's while a server on it is started, killed and started again.

    It lies below the range from which the kernel takes ports for outgoing connections and for port 0, and is
    claimed with a socket in the abstract namespace, which is open until this process ends.
    """
    ephemeral = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32768
    # From the system: tests seed the shared generator.
    candidates = random.SystemRandom()
    while True:
        port = candidates.randrange(_FIRST, max(ephemeral, 2 * _FIRST))
        with contextlib.suppress(OSError), socket.socket() as probe, socket.socket(socket.AF_UNIX) as claim:
            probe.bind(("127.0.0.1", port))
            claim.bind(f"\0diptych-test-port-{port}")
            os.dup(claim.fileno())  # stays open
            return port
