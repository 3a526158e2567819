"""The part of etcd's v3 API that discovery needs, spoken to its JSON gateway over HTTP.

The gateway is on by default in every etcd since 3.4. Each call has a deadline and tries every endpoint once,
starting with the one that answered last. Knows nothing of workers, and keeps no state but the endpoint and
the token that etcd gave for user and password.
"""

import asyncio
import base64
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from diptych.errors import ConfigError

NOT_FOUND = 5  # gRPC codes
_CANCELLED = 1
_UNKNOWN = 2
_OUT_OF_RANGE = 11
_UNAVAILABLE = 14
_AUTH_CODES = (3, 7, 16)  # "user name is empty", "permission denied", "invalid auth token"


class EtcdError(Exception):
    """etcd did not do what was asked."""


class EtcdUnreachable(EtcdError):
    """No endpoint answered in time."""


class EtcdRefused(EtcdError):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdAddress:
    """Where etcd is and how it knows us. `endpoints` are base URLs."""

    endpoints: tuple[str, ...]
    user: str | None = None
    password: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __str__(self) -> str:
        return ", ".join(self.endpoints)


@dataclass(frozen=True, slots=True)
class Item:
    value: bytes
    lease_id: int


@dataclass(frozen=True, slots=True)
class Listing:
    items: Mapping[str, Item]
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    key: str
    value: bytes | None  # None: deleted
    revision: int


class EtcdClient:
    """Use from one event loop; `close` when done."""

    def __init__(self, address: EtcdAddress) -> None:
        self._address = address
        self._ssl = _tls(address)
        self._session: aiohttp.ClientSession | None = None
        self._current = 0  # index of the endpoint that answered last
        self._token: str | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def read_prefix(self, prefix: str, timeout_s: float) -> Listing:
        body = {"key": _b64(prefix), "range_end": _b64(_prefix_end(prefix))}
        answer = await self._call("/v3/kv/range", body, timeout_s)
        items = {_text(kv["key"]): _item(kv) for kv in answer.get("kvs", [])}
        return Listing(items, int(answer["header"]["revision"]))

    async def get(self, key: str, timeout_s: float) -> Item | None:
        answer = await self._call("/v3/kv/range", {"key": _b64(key)}, timeout_s)
        kvs = answer.get("kvs", [])
        return _item(kvs[0]) if kvs else None

    async def create(self, key: str, value: bytes, lease_id: int, timeout_s: float) -> Item | None:
        """Write a key that does not exist; the item that does otherwise."""
        condition = {"key": _b64(key), "target": "CREATE", "create_revision": "0"}
        answer = await self._write_if(condition, key, value, lease_id, timeout_s)
        if answer.get("succeeded"):
            return None
        kvs = answer["responses"][0]["response_range"].get("kvs", [])
        return _item(kvs[0]) if kvs else None

    async def replace(self, key: str, value: bytes, lease_id: int, timeout_s: float) -> bool:
        """Write a key that exists; False when it does not."""
        condition = {"key": _b64(key), "target": "CREATE", "create_revision": "0", "result": "GREATER"}
        answer = await self._write_if(condition, key, value, lease_id, timeout_s)
        return bool(answer.get("succeeded"))

    async def delete(self, key: str, timeout_s: float) -> None:
        await self._call("/v3/kv/deleterange", {"key": _b64(key)}, timeout_s)

    async def grant(self, ttl_s: int, timeout_s: float) -> int:
        answer = await self._call("/v3/lease/grant", {"TTL": str(ttl_s), "ID": "0"}, timeout_s)
        return int(answer["ID"])

    async def keep_alive(self, lease_id: int, timeout_s: float) -> bool:
        """False when the lease has ended."""
        try:
            answer = await self._call("/v3/lease/keepalive", {"ID": str(lease_id)}, timeout_s)
        except EtcdRefused as error:
            if error.code == NOT_FOUND:
                return False
            raise
        # A lease that has ended is answered without an error, and with no TTL.
        return int(answer.get("result", {}).get("TTL", 0)) > 0

    async def revoke(self, lease_id: int, timeout_s: float) -> None:
        """End a lease and delete its keys; one that has ended is fine."""
        try:
            await self._call("/v3/lease/revoke", {"ID": str(lease_id)}, timeout_s)
        except EtcdRefused as error:
            if error.code != NOT_FOUND:
                raise

    async def watch(self, prefix: str, revision: int, connect_s: float) -> AsyncGenerator[list[Change], None]:
        """Changes from `revision` on. Ends, or raises EtcdError, when the stream does: list again then."""
        keys = {"key": _b64(prefix), "range_end": _b64(_prefix_end(prefix))}
        create = {**keys, "start_revision": str(revision)}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s)
        url = self._address.endpoints[self._current] + "/v3/watch"
        body = orjson.dumps({"create_request": create})
        rest = b""
        try:
            async with self._http.post(url, data=body, headers=self._headers(), timeout=timeout) as response:
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in filter(None, lines):
                        changes = _changes(orjson.loads(line))
                        if changes:
                            yield changes
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, orjson.JSONDecodeError) as error:
            raise EtcdUnreachable(f"the watch broke off: {_reason(error)}") from error

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._ssl)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self._session

    def _headers(self) -> dict[str, str]:
        return {} if self._token is None else {"Authorization": self._token}

    async def _write_if(
        self, condition: dict[str, Any], key: str, value: bytes, lease_id: int, timeout_s: float
    ) -> dict[str, Any]:
        put = {"key": _b64(key), "value": _b64(value), "lease": str(lease_id)}
        body = {
            "compare": [condition],
            "success": [{"request_put": put}],
            "failure": [{"request_range": {"key": _b64(key)}}],
        }
        return await self._call("/v3/kv/txn", body, timeout_s)

    async def _call(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if self._address.user is None:
            return await self._ask(path, body, timeout_s)
        renewed = self._token is None
        if renewed:
            await self._authenticate(timeout_s)
        try:
            return await self._ask(path, body, timeout_s)
        except EtcdRefused as error:
            # Tokens end after minutes, and with the etcd process that gave them.
            if renewed or error.code not in _AUTH_CODES:
                raise
        await self._authenticate(timeout_s)
        return await self._ask(path, body, timeout_s)

    async def _authenticate(self, timeout_s: float) -> None:
        self._token = None
        body = {"name": self._address.user, "password": self._address.password or ""}
        answer = await self._ask("/v3/auth/authenticate", body, timeout_s)
        self._token = str(answer["token"])

    async def _ask(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        endpoints = self._address.endpoints
        timeout = aiohttp.ClientTimeout(total=timeout_s / len(endpoints))
        failures = []
        for turn in range(len(endpoints)):
            index = (self._current + turn) % len(endpoints)
            url = endpoints[index] + path
            try:
                async with self._http.post(
                    url, data=orjson.dumps(body), headers=self._headers(), timeout=timeout
                ) as response:
                    answer = orjson.loads(await response.read())
                    status = response.status
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, orjson.JSONDecodeError) as error:
                failures.append(f"{endpoints[index]}: {_reason(error)}")
                continue
            if status == 503 or (isinstance(answer, dict) and answer.get("code") == _UNAVAILABLE):
                failures.append(f"{endpoints[index]}: {answer.get('message', status)}")
                continue
            self._current = index
            if status != 200 or not isinstance(answer, dict):
                raise _refusal(answer, status)
            return answer
        self._current = (self._current + 1) % len(endpoints)
        raise EtcdUnreachable("; ".join(failures))


def _refusal(answer: Any, status: int) -> EtcdRefused:
    if not isinstance(answer, dict):
        return EtcdRefused(_UNKNOWN, f"etcd answers with status {status}")
    message = answer.get("message") or answer.get("error") or f"etcd answers with status {status}"
    return EtcdRefused(int(answer.get("code", _UNKNOWN)), str(message))


def _changes(message: dict[str, Any]) -> list[Change]:
    if "error" in message:
        error = message["error"]
        raise EtcdRefused(
            int(error.get("grpc_code", _UNKNOWN)), str(error.get("message", "the watch failed"))
        )
    result = message["result"]
    compacted = int(result.get("compact_revision", 0))
    if compacted:
        raise EtcdRefused(_OUT_OF_RANGE, f"the history before revision {compacted} was compacted")
    if result.get("canceled"):
        raise EtcdRefused(_CANCELLED, str(result.get("cancel_reason") or "etcd cancelled the watch"))
    return [
        Change(
            _text(event["kv"]["key"]),
            None if event.get("type") == "DELETE" else _bytes(event["kv"].get("value", "")),
            int(event["kv"]["mod_revision"]),
        )
        for event in result.get("events", [])
    ]


def _tls(address: EtcdAddress) -> ssl.SSLContext | bool:
    """What verifies etcd's certificate: True is the system's list of authorities."""
    if address.ca_file is None and address.cert_file is None:
        return True
    try:
        context = ssl.create_default_context(cafile=address.ca_file)
        if address.cert_file is not None:
            context.load_cert_chain(address.cert_file, address.key_file)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(filter(None, (address.ca_file, address.cert_file, address.key_file)))
        raise ConfigError(f"The certificate files for etcd ({files}) cannot be used: {error}.") from error
    return context


def _prefix_end(prefix: str) -> bytes:
    """The first key after all those that begin with `prefix`, whose last character is below U+007F."""
    data = prefix.encode()
    return data[:-1] + bytes([data[-1] + 1])


def _item(kv: dict[str, Any]) -> Item:
    return Item(_bytes(kv.get("value", "")), int(kv.get("lease", 0)))


def _b64(data: str | bytes) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def _bytes(data: str) -> bytes:
    return base64.b64decode(data)


def _text(data: str) -> str:
    return _bytes(data).decode(errors="replace")


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
