"""The pool fits the memory, or the worker says in one sentence why not."""

import msgspec
import pytest
import torch

from diptych.errors import StartupError
from diptych.kv_layout import KvLayout
from diptych.worker import kv_memory
from diptych.worker.parallel import ParallelDims
from diptych.worker.settings import EngineSettings

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, tokens_per_block=8)  # blocks of 2 KiB
SETTINGS = EngineSettings(model_path="m", incarnation="me", tokens_per_block=8)


@pytest.mark.parametrize(
    ("device", "free", "settings", "expected"),
    [
        ("cpu", 100 << 10, {}, 45),
        ("cpu", 100 << 30, {}, 262144),  # the CPU's pool is bounded
        ("cuda", 100 << 30, {"kv_memory_fraction": 0.5}, 26214400),
        ("cuda", 100 << 10, {"max_kv_tokens": 41}, 6),
    ],
)
def test_number_of_blocks(monkeypatch, device, free, settings, expected):
    monkeypatch.setattr(kv_memory, "_available_bytes", lambda asked: free if asked == device else 0)
    chosen = msgspec.structs.replace(SETTINGS, device=device, **settings)
    assert kv_memory.num_blocks(chosen, LAYOUT) == expected


@pytest.mark.parametrize("settings", [{}, {"max_kv_tokens": 1000}])
def test_a_pool_that_does_not_fit_is_refused(monkeypatch, settings):
    monkeypatch.setattr(kv_memory, "_available_bytes", lambda _: 2000)
    with pytest.raises(StartupError, match=r"kv_cache_config\.max_tokens"):
        kv_memory.num_blocks(msgspec.structs.replace(SETTINGS, **settings), LAYOUT)


def test_the_model_sees_the_pools_memory():
    pool, tensor = kv_memory.create_pool(SETTINGS, LAYOUT, 5)
    assert tensor.shape == (5, 2, 2, 2, 8, 16)
    assert tensor.dtype == torch.bfloat16
    tensor[3] = 1.0
    assert pool.digest([3]) != pool.digest([2])
    pool.close()


def test_transports_are_those_of_the_device():
    both = msgspec.structs.replace(SETTINGS, transports=("shm", "tcp"))
    assert kv_memory.usable_transports(both) == ("shm", "tcp")
    assert kv_memory.usable_transports(msgspec.structs.replace(both, device="cuda")) == ("cuda_ipc", "tcp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_without_cuda_says_so():
    assert kv_memory.require_device(SETTINGS) == torch.device("cpu")
    with pytest.raises(StartupError, match="install a torch built for CUDA"):
        kv_memory.require_device(msgspec.structs.replace(SETTINGS, device="cuda"))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for rank in range(2):
        dims = ParallelDims(tp_size=2, tp_rank=rank)
        kv_memory.require_device(msgspec.structs.replace(SETTINGS, device="cuda", dims=dims))
    assert [device.index for device in chosen] == [0, 1]
    with pytest.raises(StartupError, match="tensor_parallel_size is 3, and this process sees 2 GPUs"):
        kv_memory.require_device(
            msgspec.structs.replace(SETTINGS, device="cuda", dims=ParallelDims(tp_size=3))
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_pool_on_a_gpu_takes_its_share_of_the_free_memory():
    settings = msgspec.structs.replace(SETTINGS, device="cuda", kv_memory_fraction=0.25)
    free, _ = torch.cuda.mem_get_info()
    count = kv_memory.num_blocks(settings, LAYOUT)
    assert 0.2 * free < count * LAYOUT.block_bytes <= 0.26 * free
    pool, tensor = kv_memory.create_pool(settings, LAYOUT, 5)
    assert tensor.device.type == "cuda"
    tensor[3] = 1.0
    torch.cuda.synchronize()
    assert pool.digest([3]) != pool.digest([2])
    pool.close()
