"""Listening sockets, opened before anything slow happens: a port in use is one sentence and no traceback."""

import errno
import socket

from diptych.errors import StartupError

_BACKLOG = 4096


def open_listener(host: str, port: int, *, fd: int | None = None, reuse_port: bool = False) -> socket.socket:
    """A non-blocking listening TCP socket. With `fd`, the one that a parent process opened."""
    if fd is not None:
        return _adopt(fd)
    family, address = _resolve(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartupError(_sentence(error, host, port)) from error
    listener.setblocking(False)
    return listener


def _adopt(fd: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=fd)
        listening = bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise StartupError(f"file descriptor {fd} is not a socket: {error.strerror}") from error
    if not listening:
        listener.close()
        raise StartupError(f"the socket with file descriptor {fd} does not listen")
    listener.setblocking(False)
    return listener


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """One address; IPv4 when the name has both, because clients try "localhost" that way."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))


def _sentence(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"cannot listen on {host}:{port}: the port is in use by another process"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"cannot listen on {host}:{port}: {host} is not an address of this machine"
    if error.errno == errno.EACCES:
        return f"cannot listen on {host}:{port}: ports below 1024 need privileges"
    return f"cannot listen on {host}:{port}: {error.strerror}"
