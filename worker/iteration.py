"""One entry of `GET /metrics`: the statistics of one step under TensorRT-LLM's names."""

from datetime import datetime
from typing import Any

from diptych.worker.plan import StepPlan
from diptych.worker.scheduler import Scheduler


def iteration_stats(
    plan: StepPlan,
    scheduler: Scheduler,
    step: int,
    *,
    planned_at: float,
    latency_s: float,
    device_bytes: int,
) -> dict[str, Any]:
    """`planned_at`: on the scheduler's clock; `device_bytes`: of the GPU in use, by anyone, 0 without one."""
    pool, limits = scheduler.pool.counts(), scheduler.limits
    contexts = [chunk for chunk in plan.chunks if chunk.start + chunk.count <= chunk.sequence.num_prompt]
    prompt_tokens = scheduler.num_prompt_tokens
    new = [chunk.sequence for chunk in plan.chunks if chunk.sequence.scheduled_at == planned_at]
    return {
        "iter": step,
        "iterLatencyMS": latency_s * 1000,
        "timestamp": datetime.now().isoformat(sep=" "),
        "newActiveRequestsQueueLatencyMS": sum(planned_at - sequence.arrival for sequence in new) * 1000,
        "numNewActiveRequests": len(new),
        "gpuMemUsage": device_bytes,
        "numActiveRequests": scheduler.num_running + scheduler.num_fetching,
        "numQueuedRequests": scheduler.num_waiting,
        "maxNumActiveRequests": limits.max_batch_size,
        "inflightBatchingStats": {
            "numScheduledRequests": len(plan.chunks),
            "numContextRequests": len(contexts),
            "numGenRequests": len(plan.chunks) - len(contexts),
            "numPausedRequests": 0,
            "numCtxTokens": sum(chunk.count for chunk in contexts),
            "microBatchId": 0,
            "avgNumDecodedTokensPerIter": 1.0,
        },
        "kvCacheStats": {
            "maxNumBlocks": pool.total,
            "freeNumBlocks": pool.free + pool.cached,
            "usedNumBlocks": pool.active + pool.leased,
            "tokensPerBlock": limits.tokens_per_block,
            "cacheHitRate": scheduler.num_cached_tokens / prompt_tokens if prompt_tokens else 0.0,
        },
    }
