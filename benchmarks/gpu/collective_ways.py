"""One rank of `gpu_tp.py --part collectives`: FOLDER SIZE RANK. What a sum over ranks costs within a CUDA graph.

Each way is captured many times in one graph, so that a figure is the time of one operation between kernels.
"""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

REPEATS = 64
HIDDEN = 4096


def graph_of(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPEATS):
            step()
    return graph


def microseconds(step: Callable[[], object]) -> float:
    graph = graph_of(step)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / REPEATS)
    return sorted(times)[len(times) // 2]


def ways(rows: int, dtype: torch.dtype, size: int, group: str) -> dict[str, Callable[[], object]]:
    x = torch.ones(rows, HIDDEN, dtype=dtype, device="cuda")
    gathered = torch.empty(size * rows, HIDDEN, dtype=dtype, device="cuda")
    found: dict[str, Callable[[], object]] = {
        "nothing": lambda: x.mul_(1.0),
        "nccl all_reduce": lambda: dist.all_reduce(x),
        "nccl all_gather": lambda: dist.all_gather_into_tensor(gathered, x),
        "nccl broadcast": lambda: dist.broadcast(x, 0),
    }
    return {**found, **peer_ways(x, group)}


def peer_ways(x: Tensor, group: str) -> dict[str, Callable[[], object]]:
    """Through memory of both GPUs that each can address; no multicast."""
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(x.shape, dtype=x.dtype, device=x.device)
    symmetric.rendezvous(buffer, group)
    operations: Any = torch.ops.symm_mem
    out = torch.empty_like(x)
    found: dict[str, Callable[[], object]] = {
        "one shot": lambda: operations.one_shot_all_reduce_out(buffer, "sum", group, out),
        "two shot": lambda: operations.two_shot_all_reduce_(buffer, "sum", group),
    }
    if hasattr(operations, "one_shot_all_reduce_copy_out"):
        found["one shot with copy"] = lambda: operations.one_shot_all_reduce_copy_out(
            buffer, x, "sum", group, out
        )
    return found


def main() -> None:
    folder, size, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(
        "nccl", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60), device_id=device
    )
    group = dist.group.WORLD.group_name
    for rows in (1, 8, 16, 64, 256, 2048):
        for dtype in (torch.bfloat16, torch.float32):
            case: dict[str, Any] = {
                "rows": rows,
                "dtype": str(dtype),
                "bytes": rows * HIDDEN * dtype.itemsize,
            }
            try:
                candidates = ways(rows, dtype, size, group)
            except (RuntimeError, ImportError, AttributeError) as error:
                case["error"], candidates = f"{type(error).__name__}: {error}"[:300], {}
            for name, step in candidates.items():
                try:
                    case[name] = microseconds(step)
                except RuntimeError as error:
                    case[name] = str(error)[:200]
            if rank == 0:
                print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
