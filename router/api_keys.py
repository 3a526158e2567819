"""API keys of the public port: who may ask, and how much of the queue is theirs."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from diptych.config.api_keys import KeySetting
from diptych.errors import Unauthorized

_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One caller. `name` is for queues and metrics; the key itself is kept as a digest only."""

    name: str
    weight: float = 1.0


_ANYBODY = ApiKey("")


class ApiKeys:
    def __init__(self, keys: Iterable[tuple[str, ApiKey]] = ()) -> None:
        """No keys at all: everybody may ask."""
        self._keys = {_digest(secret): key for secret, key in keys}

    @classmethod
    def from_settings(cls, settings: Iterable[KeySetting]) -> "ApiKeys":
        return cls((setting.key, ApiKey(setting.name, setting.weight)) for setting in settings)

    def check(self, authorization: str | None) -> ApiKey:
        """Raises Unauthorized. What is compared is a digest: how long it takes says nothing of the keys."""
        if not self._keys:
            return _ANYBODY
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthorized("This server needs an API key: Authorization: Bearer KEY.")
        key = self._keys.get(_digest(authorization[len(_SCHEME) :].strip()))
        if key is None:
            raise Unauthorized("The API key is not one of this server's.")
        return key


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()
