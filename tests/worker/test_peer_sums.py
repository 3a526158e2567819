"""Sums between two GPUs, by any way that collectives.py takes, against the same sums on one."""

import subprocess
import sys

import pytest
import torch

RANK = """
import sys
import torch
from diptych.worker.collectives import ProcessGroup, open_store

rank, place = int(sys.argv[1]), sys.argv[2]
if rank == 0:
    place = open_store()
    print(place, flush=True)
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
ranks = ProcessGroup(place, rank, 2, device)
ranks.reserve(300 * 1024 * 2)
assert ranks._peer_sums is not None
generator = torch.Generator(device).manual_seed(3)
for dtype in (torch.bfloat16, torch.float32, torch.float16):
    for splits, rows, width in ((1, 1, 576), (4, 7, 1024), (2, 1, 90), (1, 300, 1024), (1, 301, 1024), (8, 16, 333)):
        both = torch.randn(2, splits, rows, width, device=device, generator=generator).to(dtype)
        expected = both.float().sum((0, 1))
        for _ in range(3):
            found = ranks.total_parts(both[rank].clone()).float().sum(0)
            assert torch.allclose(found, expected, atol=0.15 if dtype != torch.float32 else 1e-4), (dtype, rows, width)
        everyone = ranks.join_columns(found)
        assert torch.equal(everyone[:, :width], everyone[:, width:]), "not the same on both ranks"
x = both[rank][:1, :1].contiguous()
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    ranks.total_parts(x)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    out = [ranks.total_parts(x).clone() for _ in range(20)]
for _ in range(5):
    graph.replay()
torch.cuda.synchronize()
assert all(torch.equal(one, out[0]) for one in out)
assert torch.allclose(out[0].float().sum(0), both[:, :1, :1].float().sum((0, 1)), atol=0.15)
print("done", flush=True)
torch.cuda.synchronize()
import os
os._exit(0)
"""


@pytest.mark.gpu2
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_sums_of_two_gpus():
    command = [sys.executable, "-c", RANK]
    first = subprocess.Popen(
        [*command, "0", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        place = first.stdout.readline().strip()
        second = subprocess.run([*command, "1", place], capture_output=True, text=True, timeout=80)
        assert second.returncode == 0, second.stdout + second.stderr
        assert first.communicate(timeout=20)[0].strip().endswith("done")
    finally:
        first.kill()
