"""TensorRT-LLM's other spellings of worker options, brought to the names of LlmConfig.

Accepted with a warning: names of earlier releases, options that need no action here, and any case where
TensorRT-LLM wants one. Knows nothing of types or ranges: the result goes through `decode`.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from diptych.config.notices import Notices
from diptych.errors import ConfigError

# Options of TensorRT-LLM that a worker accepts and does not act on; a dot reaches into a section.
NO_EFFECT: frozenset[str] = frozenset(
    [
        "allreduce_strategy",
        "attention_dp_config",
        "attn_backend",
        "backend",
        "batch_wait_max_tokens_ratio",
        "batch_wait_timeout_iters",
        "batch_wait_timeout_ms",
        "cp_config",
        "cuda_graph_config",
        "custom_module_dirs",
        "custom_tokenizer",
        "dtype",
        "enable_attention_dp",
        "enable_autotuner",
        "enable_iter_req_stats",
        "enable_layerwise_nvtx_marker",
        "enable_lm_head_tp_in_adp",
        "enable_min_latency",
        "fail_fast_on_attention_window_too_large",
        "garbage_collection_gen0_threshold",
        "gather_generation_logits",
        "gpus_per_node",
        "guided_decoding_backend",
        "iter_stats_max_iterations",
        "media_io_kwargs",
        "moe_backend",
        "moe_config",
        "moe_tensor_parallel_size",
        "nvfp4_gemm_config",
        "num_postprocess_workers",
        "otlp_traces_endpoint",
        "peft_cache_config",
        "print_iter_log",
        "reasoning_parser",
        "request_stats_max_iterations",
        "sampler_type",
        "skip_tokenizer_init",
        "speculative_config",
        "telemetry",
        "tokenizer_mode",
        "tokenizer_revision",
        "tool_parser",
        "torch_compile_config",
        "use_torch_sampler",
        "cache_transceiver_config.kv_cache_bounce_size_mb",
        "cache_transceiver_config.kv_transfer_sender_future_timeout_ms",  # nothing here waits for a sender
        "cache_transceiver_config.transceiver_runtime",
        "kv_cache_config.attention_dp_events_gather_period_ms",
        "kv_cache_config.copy_on_partial_reuse",
        "kv_cache_config.cross_kv_cache_fraction",
        "kv_cache_config.enable_partial_reuse",
        "kv_cache_config.mamba_ssm_cache_dtype",
        "kv_cache_config.max_attention_window",
        "kv_cache_config.max_gpu_total_bytes",
        "kv_cache_config.onboard_blocks",
        "kv_cache_config.secondary_offload_min_priority",
        "kv_cache_config.sink_token_length",
        "kv_cache_config.use_uvm",
        "scheduler_config.context_chunking_policy",
        "scheduler_config.dynamic_batch_config",
        "scheduler_config.waiting_queue_policy",
    ]
)
# These are the defaults or ask for nothing: no reason to warn.
_SILENT: Mapping[str, tuple[Any, ...]] = {
    "backend": ("pytorch", None),
    "kv_cache_config.enable_partial_reuse": (False,),
}
# Our own fields that nothing acts on yet, with the values that ask for nothing else than what happens.
NOT_YET: Mapping[str, tuple[Any, ...]] = {
    "enable_chunked_prefill": (True,),
    "trust_remote_code": (False,),
    "kv_cache_config.host_cache_size": (None, 0),
}

_OTHER_NAMES: Mapping[str, str] = {
    "tp_size": "tensor_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "cp_size": "context_parallel_size",
    "ep_size": "moe_expert_parallel_size",
    "cluster_size": "moe_cluster_parallel_size",
    "hf_revision": "revision",
    "free_gpu_memory_fraction": "kv_cache_config.free_gpu_memory_fraction",
    "kv_cache_free_gpu_memory_fraction": "kv_cache_config.free_gpu_memory_fraction",
    "kv_cache_dtype": "kv_cache_config.dtype",
}
_BACKENDS = ("pytorch", "tensorrt", "trt", "_autodeploy")
_UPPER = (("scheduler_config", "capacity_scheduler_policy"), ("cache_transceiver_config", "backend"))
_ROLES: Mapping[str, str] = {"CONTEXT": "CONTEXT", "GENERATION": "GENERATION", "BOTH": "BOTH"}


def normalize(data: Mapping[str, Any], *, source: str, notices: Notices) -> dict[str, Any]:
    """A copy of `data` with every known spelling brought to ours; unknown keys stay, for `decode`."""
    options = _flatten_pytorch_backend(data, source, notices)
    options = {key: dict(value) if isinstance(value, Mapping) else value for key, value in options.items()}
    _rename(options)
    for section in ("kv_cache_config", "quant_config", "scheduler_config", "cache_transceiver_config"):
        if section in options and options[section] is None:
            del options[section]
    _rename_buffer(options.get("cache_transceiver_config"), source, notices)
    for section, key in _UPPER:
        inner = options.get(section)
        if isinstance(inner, dict) and isinstance(inner.get(key), str):
            inner[key] = inner[key].upper()
    if "backend" in options:
        _check_backend(options["backend"], source)
    if "server_role" in options:
        options["server_role"] = _role(options["server_role"], source)
    _drop_without_effect(options, source, notices)
    return options


def is_worker_option(key: str, fields: frozenset[str]) -> bool:
    """Whether a top-level key may stand in a worker's options."""
    return key in fields or key in NO_EFFECT or key in _OTHER_NAMES or key == "pytorch_backend_config"


def _flatten_pytorch_backend(data: Mapping[str, Any], source: str, notices: Notices) -> dict[str, Any]:
    options = dict(data)
    if "pytorch_backend_config" not in options:
        return options
    inner = options.pop("pytorch_backend_config")
    notices.warn(f"{source}: pytorch_backend_config is an old name; write its keys at the top level")
    if inner is None:
        return options
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{source}: pytorch_backend_config must be a mapping, not {inner!r}")
    inner = dict(inner)
    if "enable_overlap_scheduler" in inner:
        value = inner.pop("enable_overlap_scheduler")
        if not isinstance(value, bool):
            raise ConfigError(
                f"{source}: pytorch_backend_config.enable_overlap_scheduler must be true or false, "
                f"not {value!r}"
            )
        inner["disable_overlap_scheduler"] = not value
    return {**inner, **options}


def _rename(options: dict[str, Any]) -> None:
    for other, ours in _OTHER_NAMES.items():
        if other not in options:
            continue
        value = options.pop(other)
        section, _, key = ours.rpartition(".")
        if not section:
            options.setdefault(ours, value)
            continue
        inner = options.get(section)
        if inner is None:
            options[section] = {key: value}
        elif isinstance(inner, dict):
            inner.setdefault(key, value)


def _rename_buffer(section: Any, source: str, notices: Notices) -> None:
    if isinstance(section, dict) and "max_num_tokens" in section:
        notices.warn(
            f"{source}: cache_transceiver_config.max_num_tokens is an old name; write max_tokens_in_buffer"
        )
        section.setdefault("max_tokens_in_buffer", section.pop("max_num_tokens"))
        section.pop("max_num_tokens", None)


def _check_backend(value: Any, source: str) -> None:
    if value is not None and value not in _BACKENDS:
        raise ConfigError(f"{source}: backend must be one of {', '.join(_BACKENDS)}, not {value!r}")


def _role(value: Any, source: str) -> str:
    name = str(value).upper()
    if name in _ROLES:
        return _ROLES[name]
    if name == "MM_ENCODER":
        raise ConfigError(f"{source}: server_role MM_ENCODER is not supported in this version")
    nearest = difflib.get_close_matches(name, _ROLES, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ConfigError(f"{source}: server_role must be CONTEXT, GENERATION or BOTH, not {value!r}{hint}")


def _drop_without_effect(options: dict[str, Any], source: str, notices: Notices) -> None:
    ignored: list[str] = []
    for path in sorted({*NO_EFFECT, *NOT_YET}):
        section, _, key = path.rpartition(".")
        place = options.get(section) if section else options
        if not isinstance(place, dict) or key not in place:
            continue
        value = place[key] if path in NOT_YET else place.pop(key)
        if value not in (NOT_YET if path in NOT_YET else _SILENT).get(path, ()):
            ignored.append(path)
    if ignored:
        notices.warn(f"{source}: accepted, no effect in this version: {', '.join(ignored)}")
