"""Where workers and router find each other when etcd is used (`--metadata_server_config_file`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.config.cluster import check_endpoint
from diptych.config.decode import decode
from diptych.config.notices import Notices
from diptych.config.sections import PositiveFloat, PositiveInt
from diptych.config.yaml_file import read_mapping
from diptych.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataConfig:
    server_type: Literal["etcd"] = "etcd"
    hostname: str = "localhost"
    port: PositiveInt = 2379
    health_check_timeout: PositiveFloat = 5.0  # seconds without a sign of life until etcd drops a worker
    refresh_interval: PositiveFloat = 10.0  # seconds; changes are followed at once, this is the safety net
    # Ours, all optional.
    endpoints: tuple[str, ...] = ()  # several "host:port", instead of hostname and port
    cluster_name: str = ""  # several meshes in one etcd
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None  # PEM files: with any of them, or `tls`, the connection is encrypted
    cert_file: str | None = None
    key_file: str | None = None
    tls: bool = False

    @property
    def urls(self) -> tuple[str, ...]:
        scheme = "https" if self.tls or self.ca_file or self.cert_file else "http"
        host = f"[{self.hostname}]" if ":" in self.hostname else self.hostname
        places = self.endpoints or (f"{host}:{self.port}",)
        return tuple(f"{scheme}://{place.partition('://')[2] or place}" for place in places)


def load_metadata_config(path: str | Path) -> MetadataConfig:
    return metadata_config(read_mapping(path), source=str(path))


def metadata_config(data: Mapping[str, Any], *, source: str) -> MetadataConfig:
    """TensorRT-LLM's printed example misspells one key and leaves out another: both are accepted."""
    settings = dict(data)
    repairs: list[str] = []
    if "refersh_interval" in settings:
        settings.setdefault("refresh_interval", settings.pop("refersh_interval"))
        settings.pop("refersh_interval", None)
        repairs.append("refersh_interval is read as refresh_interval")
    if "server_type" not in settings:
        repairs.append("server_type is missing and taken as etcd")
    if repairs:
        Notices().warn(f"{source}: {'; '.join(repairs)}")
    config = decode(settings, MetadataConfig, source=source)
    for url in config.urls:
        check_endpoint(url, f"{source}: hostname and port, or endpoints")
    if (config.cert_file is None) != (config.key_file is None):
        raise ConfigError(f"{source}: cert_file and key_file belong together; write both or none")
    if config.password is not None and config.user is None:
        raise ConfigError(f"{source}: password needs user")
    return config
