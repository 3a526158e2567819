"""Brings a GPU to the clock that it has while it serves: an idle one copies at a third of its speed."""

import time


def burn(seconds: float) -> None:
    import torch

    matrix = torch.ones(4096, 4096, dtype=torch.bfloat16, device="cuda")
    limit = time.perf_counter() + seconds
    while time.perf_counter() < limit:
        for _ in range(8):
            matrix @ matrix
        torch.cuda.synchronize()
