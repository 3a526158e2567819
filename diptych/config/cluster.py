"""The section `disagg_cluster`: where workers register, and how many must have done so before requests are taken."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from diptych.config.decode import decode
from diptych.config.notices import Notices
from diptych.config.sections import NonNegativeInt, PositiveFloat
from diptych.errors import ConfigError

_HEARTBEAT_S, _INACTIVE_S = 5.0, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimalInstances:
    context_servers: NonNegativeInt = 1
    generation_servers: NonNegativeInt = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DisaggCluster:
    """`cluster_uri`: etcd://host:port[,host:port], or the router's own http(s)://host:port."""

    cluster_uri: str
    cluster_name: str = ""
    minimal_instances: MinimalInstances = field(default_factory=MinimalInstances)
    heartbeat_interval_sec: PositiveFloat = _HEARTBEAT_S
    inactive_timeout_sec: PositiveFloat = _INACTIVE_S

    @property
    def is_embedded(self) -> bool:
        """The router keeps the registry itself."""
        return not self.cluster_uri.startswith("etcd://")

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Base URLs of what `cluster_uri` names."""
        if self.is_embedded:
            return (self.cluster_uri.rstrip("/"),)
        places = self.cluster_uri.removeprefix("etcd://").rstrip("/").split(",")
        return tuple(f"http://{place.strip()}" for place in places)


def cluster_from_uri(uri: str, *, source: str) -> DisaggCluster:
    """`--disagg_cluster_uri`: the rest of the section has its defaults."""
    return decode(cluster_section({"cluster_uri": uri}, source, Notices()), DisaggCluster, source=source)


def cluster_section(data: Any, source: str, notices: Notices) -> Any:
    """Checks what types cannot say. TensorRT-LLM's README writes inactive_interval_sec for inactive_timeout_sec."""
    if not isinstance(data, Mapping):
        return data
    cluster = dict(data)
    if "inactive_interval_sec" in cluster:
        notices.warn(f"{source}: disagg_cluster.inactive_interval_sec is read as inactive_timeout_sec")
        cluster.setdefault("inactive_timeout_sec", cluster["inactive_interval_sec"])
        del cluster["inactive_interval_sec"]
    if isinstance(cluster.get("cluster_uri"), str):
        _check_uri(cluster["cluster_uri"], source)
    timeout = cluster.get("inactive_timeout_sec", _INACTIVE_S)
    heartbeat = cluster.get("heartbeat_interval_sec", _HEARTBEAT_S)
    if not isinstance(timeout, int | float) or not isinstance(heartbeat, int | float):
        return cluster  # the types are checked later
    if heartbeat >= timeout and "heartbeat_interval_sec" not in cluster:
        cluster["heartbeat_interval_sec"] = timeout / 3
    elif heartbeat >= timeout:
        raise ConfigError(
            f"{source}: disagg_cluster.heartbeat_interval_sec ({heartbeat:g}) must be less than "
            f"inactive_timeout_sec ({timeout:g}): one late heartbeat must not remove a worker"
        )
    return cluster


def _check_uri(uri: str, source: str) -> None:
    scheme, _, places = uri.partition("://")
    if scheme not in ("etcd", "http", "https") or not places:
        raise ConfigError(
            f"{source}: disagg_cluster.cluster_uri must be etcd://host:port[,host:port] or http://host:port, "
            f"not {uri!r}"
        )
    for place in places.rstrip("/").split(",") if scheme == "etcd" else [places]:
        check_endpoint(f"http://{place.strip()}", f"{source}: disagg_cluster.cluster_uri")


def check_endpoint(url: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        good = bool(parts.hostname) and parts.port is not None and not parts.username
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{where}: {url.partition('://')[2]!r} is not a host:port")
