"""Options of one worker: command line below, YAML file above.

The file wins over the command line, as in TensorRT-LLM: sections named in `_DEEP` are merged key by key,
everything else replaces. Knows no hardware: what is None here is filled in by `resolve_limits`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.config.cluster import DisaggCluster, cluster_section
from diptych.config.decode import decode
from diptych.config.metadata import MetadataConfig
from diptych.config.notices import Notices
from diptych.config.sections import (
    CacheTransceiverConfig,
    KvCacheConfig,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    QuantConfig,
    SchedulerConfig,
)
from diptych.config.upstream import normalize
from diptych.config.yaml_file import read_mapping
from diptych.errors import ConfigError
from diptych.wire import Role

LogLevel = Literal["internal_error", "error", "warning", "info", "verbose", "debug", "trace"]
Port = NonNegativeInt

_DEEP = ("kv_cache_config",)
_NOT_PARALLEL = (
    "pipeline_parallel_size",
    "context_parallel_size",
    "moe_expert_parallel_size",
    "moe_cluster_parallel_size",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmConfig:
    # What to serve.
    model: str  # directory, GGUF file or name
    tokenizer: str | None = None
    served_model_name: str | None = None  # None: the last part of `model`
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None  # the template's text
    load_format: Literal["auto", "dummy"] = "auto"
    # Where.
    host: str = "localhost"
    port: Port = 8000
    listen_fd: NonNegativeInt | None = None  # an inherited listening socket, instead of host and port
    server_role: Role = "BOTH"
    # With what.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt | None = None  # CPU only; None: one for each core
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = 1
    moe_expert_parallel_size: PositiveInt | None = None
    moe_cluster_parallel_size: PositiveInt | None = None
    max_batch_size: PositiveInt | None = None
    max_num_tokens: PositiveInt | None = None
    max_seq_len: PositiveInt | None = None
    max_beam_width: PositiveInt = 1
    enable_chunked_prefill: bool = True
    stream_interval: PositiveInt = 1
    disable_overlap_scheduler: bool = False
    kv_cache_config: KvCacheConfig = field(default_factory=KvCacheConfig)
    quant_config: QuantConfig = field(default_factory=QuantConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache_transceiver_config: CacheTransceiverConfig = field(default_factory=CacheTransceiverConfig)
    # What to tell.
    enable_iter_perf_stats: bool = False
    return_perf_metrics: bool = False
    perf_metrics_max_requests: NonNegativeInt = 0
    log_level: LogLevel = "info"
    # Where to register, and how to leave.
    metadata_server: MetadataConfig | None = None
    disagg_cluster: DisaggCluster | None = None
    cluster_secret: str | None = field(default=None, repr=False)
    drain_timeout_s: PositiveFloat = 60.0
    # An engine that answers nothing for so long: is not healthy; is killed.
    stall_timeout_s: PositiveFloat = 20.0
    hang_timeout_s: PositiveFloat = 300.0
    # Limits of the HTTP side.
    max_queue_size: PositiveInt = 1024  # requests that wait beside those that run
    max_body_bytes: PositiveInt = 64 * 2**20

    @property
    def model_name(self) -> str:
        """The name that clients use: a directory's or file's last part, or the name as given."""
        if self.served_model_name is not None:
            return self.served_model_name
        path = Path(self.model)
        return path.resolve().name if path.exists() else self.model


def load_llm_config(
    model: str, options: Mapping[str, Any] | None = None, config_file: str | Path | None = None
) -> LlmConfig:
    """`options`: what the command line gave, under the names of LlmConfig or TensorRT-LLM's short ones."""
    notices = Notices()
    line = normalize({"model": model, **(options or {})}, source="command line", notices=notices)
    source, merged = "command line", line
    if config_file is not None:
        source = str(config_file)
        merged = _merged(line, normalize(read_mapping(config_file), source=source, notices=notices))
    if merged.get("disagg_cluster") is not None:
        merged["disagg_cluster"] = cluster_section(merged["disagg_cluster"], source, notices)
    return check(decode(_with_template(merged, source), LlmConfig, source=source), source=source)


def check(config: LlmConfig, *, source: str) -> LlmConfig:
    """What single fields cannot say: settings that this version cannot honour, and ports."""
    for name in _NOT_PARALLEL:
        size = getattr(config, name)
        if size is not None and size > 1:
            raise ConfigError(
                f"{source}: {name} must be 1, not {size}: in this version a worker has several ranks by "
                "tensor_parallel_size only"
            )
    if config.max_beam_width > 1:
        raise ConfigError(
            f"{source}: max_beam_width must be 1, not {config.max_beam_width}: there is no beam search"
        )
    if config.port > 65535:
        raise ConfigError(f"{source}: port must be from 0 to 65535, not {config.port}")
    return config


def _merged(line: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**line, **file}
    for key in _DEEP:
        below, above = line.get(key), file.get(key)
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            merged[key] = {**below, **above}
    return merged


def _with_template(options: dict[str, Any], source: str) -> dict[str, Any]:
    """`chat_template` may name a file; a template's own text always has braces."""
    value = options.get("chat_template")
    if not isinstance(value, str) or "{" in value:
        return options
    try:
        return {**options, "chat_template": Path(value).read_text(encoding="utf-8")}
    except OSError as error:
        raise ConfigError(
            f"{source}: chat_template {value!r} is neither a template nor a file: {error.strerror}"
        ) from error
