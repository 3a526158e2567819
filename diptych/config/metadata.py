"""Where workers and router find each other when a registry is used (`--metadata_server_config_file`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diptych.config.decode import decode
from diptych.config.notices import Notices
from diptych.config.sections import PositiveFloat, PositiveInt
from diptych.config.yaml_file import read_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataConfig:
    server_type: Literal["etcd"] = "etcd"
    hostname: str = "localhost"
    port: PositiveInt = 2379
    health_check_timeout: PositiveFloat = 5.0  # seconds
    refresh_interval: PositiveFloat = 10.0  # seconds


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
    return decode(settings, MetadataConfig, source=source)
