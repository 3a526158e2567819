"""The metrics of Triton's TensorRT-LLM backend under its names and labels, as Prometheus text.

Written out here because its counter has no `_total`, which the Prometheus library would add.
"""

import time
from collections.abc import Mapping

from diptych.wire import EngineReady, EngineStats


def triton_text(model: str, stats: EngineStats, ready: EngineReady | None) -> bytes:
    """`ready`: None while the model loads; there are no metrics before."""
    if ready is None:
        return b""
    used = stats.active_blocks + stats.leased_blocks
    lines = _metric(
        model,
        "request",
        "request_type",
        {
            "context": stats.prefilling,
            "scheduled": stats.running,
            "max": ready.max_batch_size,
            "active": stats.running + stats.fetching,
            "waiting": stats.waiting,
        },
    )
    on_gpu = ready.device != "cpu"
    memory = {"pinned": 0, "gpu": ready.pool_bytes if on_gpu else 0, "cpu": 0 if on_gpu else ready.pool_bytes}
    lines += _metric(model, "runtime_memory", "memory_type", memory)
    blocks = {
        "tokens_per": stats.tokens_per_block,
        "used": used,
        "free": stats.total_blocks - used,
        "max": stats.total_blocks,
        "reused": stats.cached_tokens // max(1, stats.tokens_per_block),
        "fraction": used / max(1, stats.total_blocks),
    }
    lines += _metric(model, "kv_cache_block", "kv_cache_block_type", blocks)
    batch = {
        "micro_batch_id": 0,
        "generation_requests": stats.running - stats.prefilling,
        "total_context_tokens": stats.pending_prompt_tokens,
        "paused_requests": 0,
    }
    lines += _metric(model, "inflight_batcher", "inflight_batcher_specific_metric", batch)
    general = {"iteration_counter": stats.steps, "timestamp": int(time.time())}
    lines += _metric(model, "general", "general_type", general)
    transfers = {"kv_cache_transfer_ms": stats.fetch_s * 1000, "request_count": stats.fetches}
    lines += _metric(model, "disaggregated_serving", "disaggregated_serving_type", transfers, kind="counter")
    return "\n".join([*lines, ""]).encode()


def _metric(
    model: str, subject: str, label: str, values: Mapping[str, float], *, kind: str = "gauge"
) -> list[str]:
    name = f"nv_trt_llm_{subject}_metrics"
    lines = [f"# HELP {name} TRT LLM {subject.replace('_', ' ')} metrics", f"# TYPE {name} {kind}"]
    for value_name, value in values.items():
        labels = {"model": model, "version": "1", label: value_name}
        written = ",".join(f'{key}="{_escaped(labels[key])}"' for key in sorted(labels))
        lines.append(f"{name}{{{written}}} {value}")
    return lines


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
