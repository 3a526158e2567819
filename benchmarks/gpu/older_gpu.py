"""A pytest plugin: Triton's kernels are compiled as for an older GPU, and run on this one.

    OLDER_GPU=80 PYTHONPATH=.:benchmarks/gpu python -m pytest -p older_gpu -m "gpu and not model" tests/kernels

80 stands for an A100, 89 for an L4 or RTX 4090: their instructions (no copy engine, no wgmma, no dependent launch, and
before 89 no FP8), and their shared memory, beyond which a kernel is an error. Only the last step, from PTX to machine
code, is this GPU's. What it cannot show is how fast they are.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.nvidia.compiler import CUDABackend

from diptych.kernels import flashinfer_attention, gpu

_SHARED_BYTES = {80: 163 << 10, 89: 99 << 10}
_CAPABILITY = int(os.environ["OLDER_GPU"])
_HERE = torch.cuda.get_device_capability()
_LIMIT = _SHARED_BYTES[_CAPABILITY]

_compiled: dict[str, int] = {}  # kernels, and the most shared memory of each
_make_cubin = CUDABackend.make_cubin
_shared_bytes = gpu.shared_bytes


def _checked_cubin(self: Any, src: str, metadata: dict[str, Any], options: Any, capability: int) -> bytes:
    name, shared = metadata["name"], metadata["shared"]
    assert options.arch == f"sm{_CAPABILITY}"
    assert shared <= _LIMIT, f"{name} takes {shared} bytes of shared memory, and there are {_LIMIT}"
    _compiled[name] = max(_compiled.get(name, 0), shared)
    cubin: bytes = _make_cubin(self, src, metadata, options, 10 * _HERE[0] + _HERE[1])
    return cubin


os.environ["TRITON_OVERRIDE_ARCH"] = f"sm{_CAPABILITY}"
os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"triton-sm{_CAPABILITY}"))
CUDABackend.make_cubin = _checked_cubin
torch.cuda.get_device_capability = lambda device=None: divmod(_CAPABILITY, 10)
flashinfer_attention.is_installed = lambda: False  # it would compile for that GPU alone
gpu.shared_bytes = lambda device: (
    min(_shared_bytes(device), _LIMIT) if device.type == "cuda" else _shared_bytes(device)
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    most = max(_compiled, key=_compiled.__getitem__, default="")
    terminalreporter.write_line(
        f"compiled for sm_{_CAPABILITY}: {len(_compiled)} kernels; most shared bytes: {_compiled.get(most, 0)} ({most})"
    )
