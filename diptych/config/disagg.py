"""The disaggregated server's YAML file: settings of the router, worker URLs, and options of workers for `up`.

Top-level keys that are worker options hold for both sections, as in TensorRT-LLM; one that differs is an
error. Knows nothing of sockets: URLs stay as they are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from diptych.config.api_keys import KeySetting, read_api_keys
from diptych.config.cluster import DisaggCluster, MinimalInstances, cluster_section
from diptych.config.decode import decode, field_names, unknown_key
from diptych.config.llm import LlmConfig, LogLevel
from diptych.config.metadata import MetadataConfig
from diptych.config.notices import Notices
from diptych.config.routing import ConditionalDisagg, policy_options
from diptych.config.sections import NonNegativeInt, PositiveFloat, PositiveInt
from diptych.config.upstream import is_worker_option, normalize
from diptych.config.yaml_file import read_mapping
from diptych.discovery.address import parse_address
from diptych.errors import ConfigError

_NO_EFFECT = frozenset(
    [
        "allow_request_chat_template",
        "bind_host",
        "disagg_coordinator_url",
        "gen_strip_message_history",
        "gen_tokids_ctxbytes",
        "internal_request_auth_key",
        "otlp_config",
        "perf_metrics_output_dir",
    ]
)
_NOT_FOR_SECTIONS = frozenset(
    (
        *("host", "port", "listen_fd", "server_role", "model", "log_level"),
        *("metadata_server", "disagg_cluster", "cluster_secret"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSection:
    """How workers of one role are chosen. `options` belong to the policy that `type` names."""

    type: str = "round_robin"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSection:
    """The workers of one role. `options` are worker options that `up` starts them with."""

    num_instances: NonNegativeInt | None = None
    urls: tuple[str, ...] = ()
    router: RouterSection = field(default_factory=RouterSection)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.urls) if self.num_instances is None else self.num_instances


@dataclass(frozen=True, slots=True, kw_only=True)
class DisaggConfig:
    hostname: str = "localhost"
    port: NonNegativeInt = 8000
    listen_fd: NonNegativeInt | None = None  # an inherited listening socket, instead of hostname and port
    model: str | None = None
    backend: str | None = None
    context_servers: ServerSection = field(default_factory=ServerSection)
    generation_servers: ServerSection = field(default_factory=ServerSection)
    max_retries: NonNegativeInt = 1
    request_timeout_s: PositiveFloat = 180.0
    server_start_timeout_s: PositiveFloat = 180.0
    schedule_style: Literal["context_first", "generation_first"] = "context_first"
    conditional_disagg_config: ConditionalDisagg | None = None
    disagg_cluster: DisaggCluster | None = None
    metadata_server: MetadataConfig | None = None
    cluster_secret: str | None = field(default=None, repr=False)
    max_concurrent_requests: PositiveInt | None = None  # None: what the workers can use
    max_queued_requests: NonNegativeInt | None = None  # None: in proportion to those that run
    api_keys: tuple[KeySetting, ...] = ()  # empty: everybody may ask
    max_body_bytes: PositiveInt = 64 * 2**20
    num_workers: PositiveInt = 1  # router processes
    server_keep_alive_timeout: PositiveFloat = 10.0  # seconds
    perf_metrics_max_requests: NonNegativeInt = 0
    node_id: NonNegativeInt | None = None
    log_level: LogLevel = "info"

    @property
    def minimal_instances(self) -> MinimalInstances | None:
        return None if self.disagg_cluster is None else self.disagg_cluster.minimal_instances

    def require_urls(self, source: str) -> None:
        """The router by itself starts no workers: it must be told where they are, or where they register."""
        if self.disagg_cluster is not None and self.metadata_server is not None:
            raise ConfigError(
                f"{source}: disagg_cluster and --metadata_server_config_file both say where workers register; "
                "use one of them"
            )
        if self.disagg_cluster is not None and self.disagg_cluster.is_embedded and self.num_workers > 1:
            raise ConfigError(
                f"{source}: num_workers must be 1, not {self.num_workers}, when the router keeps the registry "
                "itself; with an etcd:// cluster_uri it may be more"
            )
        if self.disagg_cluster is not None or self.metadata_server is not None:
            return
        for role, section in (
            ("context_servers", self.context_servers),
            ("generation_servers", self.generation_servers),
        ):
            if not section.urls:
                raise ConfigError(
                    f'{source}: {role}.urls must name at least one worker, such as "localhost:8001"'
                )


def load_disagg_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> DisaggConfig:
    """`overrides`: fields of DisaggConfig that the command line gave; they win over the file."""
    return disagg_config(read_mapping(path), source=str(path), overrides=overrides)


def disagg_config(
    data: Mapping[str, Any], *, source: str, overrides: Mapping[str, Any] | None = None
) -> DisaggConfig:
    notices = Notices()
    own = field_names(DisaggConfig) - {"metadata_server", "context_servers", "generation_servers"}
    settings: dict[str, Any] = {}
    inherited: dict[str, Any] = {}
    for key, value in data.items():
        if key in ("context_servers", "generation_servers"):
            continue
        if key in own:
            settings[key] = value
        elif key in _NO_EFFECT:
            notices.warn(f"{source}: accepted, no effect in this version: {key}")
        elif is_worker_option(key, field_names(LlmConfig)):
            inherited[key] = value
        else:
            known = own | field_names(LlmConfig) | {"context_servers", "generation_servers"}
            raise unknown_key(key, known, source=source)
    if settings.get("disagg_cluster") is not None:
        settings["disagg_cluster"] = cluster_section(settings["disagg_cluster"], source, notices)
    for role in ("context_servers", "generation_servers"):
        settings[role] = _section(data.get(role), role, inherited, settings, source, notices)
    settings |= overrides or {}
    api_keys = read_api_keys(settings.pop("api_keys", None), source=source)
    config = replace(decode(settings, DisaggConfig, source=source), api_keys=api_keys)
    aware = config.generation_servers.router.type == "kv_cache_aware"
    if config.conditional_disagg_config is not None and not aware:
        raise ConfigError(
            f"{source}: conditional_disagg_config needs generation_servers.router.type kv_cache_aware, not "
            f"{config.generation_servers.router.type}: only that one knows what is in the workers' caches"
        )
    if config.port > 65535:
        raise ConfigError(f"{source}: port must be from 0 to 65535, not {config.port}")
    return config


def _section(
    data: Any,
    role: str,
    inherited: Mapping[str, Any],
    settings: Mapping[str, Any],
    source: str,
    notices: Notices,
) -> dict[str, Any]:
    written = data is not None
    data = {} if data is None else data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: {role} must be a mapping, not {data!r}")
    options: dict[str, Any] = {}
    for key, value in data.items():
        if key in ("num_instances", "urls", "router"):
            continue
        if not is_worker_option(key, field_names(LlmConfig) - _NOT_FOR_SECTIONS) and key != "model":
            known = (field_names(LlmConfig) - _NOT_FOR_SECTIONS) | {"num_instances", "urls", "router"}
            raise unknown_key(f"{role}.{key}", known, source=source)
        above = inherited.get(key, settings.get(key) if key in ("model", "backend") else None)
        if above is not None and above != value:
            raise ConfigError(
                f"{source}: {role}.{key} is {value!r}, but the top level says {above!r}; write it once"
            )
        options[key] = value
    options = {key: value for key, value in {**inherited, **options}.items() if key != "model"}
    options = normalize(options, source=f"{source}: {role}", notices=notices)
    decode({"model": "", **options}, LlmConfig, source=f"{source}: {role}")
    section: dict[str, Any] = {"options": options, "router": _router(data.get("router"), role, source)}
    if data.get("num_instances") is not None:
        section["num_instances"] = data["num_instances"]
    section["urls"] = _urls(data.get("urls"), role, source)
    if written and not section["urls"]:
        section.setdefault("num_instances", 1)
    _check_count(section, role, source)
    return section


def _router(data: Any, role: str, source: str) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{source}: {role}.router must be a mapping such as {{type: round_robin}}, not {data!r}"
        )
    options = {key: value for key, value in data.items() if key != "type"}
    name = data.get("type", "round_robin")
    policy_options(name, options, source=f"{source}: {role}.router")  # raises what is wrong with them
    return {"type": name, "options": options}


def _urls(data: Any, role: str, source: str) -> list[str]:
    if data is None:
        return []
    if not isinstance(data, list):
        raise ConfigError(f'{source}: {role}.urls must be a list such as ["localhost:8001"], not {data!r}')
    for url in data:
        _check_url(url, f"{source}: {role}.urls")
    duplicates = sorted({url for url in data if data.count(url) > 1})
    if duplicates:
        raise ConfigError(f"{source}: {role}.urls names {duplicates[0]} more than once")
    return list(data)


def _check_url(url: Any, where: str) -> None:
    if not isinstance(url, str):
        raise ConfigError(f'{where} must be texts such as "localhost:8001", not {url!r}')
    try:
        parse_address(url)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}") from error


def _check_count(section: Mapping[str, Any], role: str, source: str) -> None:
    count, urls = section.get("num_instances"), section["urls"]
    if isinstance(count, int) and urls and count != len(urls):
        raise ConfigError(
            f"{source}: {role}.num_instances is {count}, but {role}.urls names {len(urls)}; they must agree"
        )
