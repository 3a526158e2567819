"""API keys of the public port: who may ask, and how much of the queue is theirs."""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from diptych.errors import DiptychError

_SCHEME = "bearer "


class Unauthorized(DiptychError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One caller. `name` is for queues and metrics; the key itself is kept as a digest only."""

    name: str
    weight: float = 1.0


_ANYBODY = ApiKey("")


class ApiKeys:
    def __init__(self, keys: Iterable[tuple[str, ApiKey]] = ()) -> None:
        """No keys at all: everybody may ask."""
        self._keys = {_digest(secret): (secret.encode(), key) for secret, key in keys}

    def check(self, authorization: str | None) -> ApiKey:
        """Raises Unauthorized. Takes the same time for every wrong key: what is looked up is its digest."""
        if not self._keys:
            return _ANYBODY
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthorized("This server needs an API key: Authorization: Bearer KEY.")
        given = authorization[len(_SCHEME) :].strip()
        secret, key = self._keys.get(_digest(given), (b"", _ANYBODY))
        if not secret or not hmac.compare_digest(secret, given.encode("utf-8", "replace")):
            raise Unauthorized("The API key is not one of this server's.")
        return key


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()
