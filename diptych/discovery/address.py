"""Addresses of workers as people write them: ``host:port``, ``http://host:port``, ``[::1]:8001``."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from diptych.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.netloc}"


def parse_address(text: str) -> Address:
    """Read a worker's address; raises ConfigError that shows the text and the forms that are allowed."""
    stripped = text.strip()
    try:
        parts = urlsplit(stripped if "://" in stripped else f"http://{stripped}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _refuse(text, str(error)) from None
    if parts.scheme != "http":
        raise _refuse(text, f"the scheme {parts.scheme!r} is not supported")
    if not host:
        raise _refuse(text, "the host is missing")
    if port is None or port == 0:
        raise _refuse(text, "the port is missing")
    if parts.username is not None or parts.path.rstrip("/") or parts.query or parts.fragment:
        raise _refuse(text, "only host and port may be given")
    return Address(host, port)


def _refuse(text: str, reason: str) -> ConfigError:
    return ConfigError(
        f"The address {text!r} cannot be used: {reason}; write host:port, http://host:port or [ipv6]:port.",
        param="urls",
    )
