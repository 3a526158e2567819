"""The GPUs of this host and how they reach each other, as `nvidia-smi` says; and whether torch can use them."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from diptych.transceiver.doctor.finding import Finding

_DRIVER = Path("/dev/nvidiactl")
_TIMEOUT_S = 20.0
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def has_driver() -> bool:
    return _DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def gpus() -> Iterator[Finding]:
    if not has_driver():
        yield Finding(section="GPUs", name="", status="none", detail="none: the engine runs on the CPU")
        return
    listed = _ask("--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader")
    if not listed:
        yield Finding(
            section="GPUs",
            name="",
            status="fails",
            detail="there is an NVIDIA driver, but nvidia-smi names no GPU",
            remedy="start the container with --gpus all, or set --device cpu",
        )
        return
    for line in listed.splitlines():
        index, _, rest = line.partition(", ")
        yield Finding(section="GPUs", name=f"GPU{index}", detail=rest)
    yield from _links()
    yield _torch()


def matrix(text: str) -> dict[tuple[int, int], str]:
    """The cells of nvidia-smi's table of GPUs by GPUs, each pair once."""
    cells: dict[tuple[int, int], str] = {}
    for line in _STYLE.sub("", text).splitlines():
        words = line.split()
        if len(words) < 2 or not re.fullmatch(r"GPU\d+", words[0]) or words[1].startswith("GPU"):
            continue
        row = int(words[0][3:])
        for column, cell in enumerate(words[1:]):
            if column < row:
                cells[column, row] = cell
    return cells


def _links() -> Iterator[Finding]:
    topology, reads = matrix(_ask("topo", "-m")), matrix(_ask("topo", "-p2p", "r"))
    for (first, second), link in sorted(topology.items()):
        state = reads.get((first, second), "unknown")
        name = f"GPU{first}-{second}"
        if state in ("OK", "unknown"):
            yield Finding(section="GPUs", name=name, detail=f"{link}, peer access {state}")
        else:
            yield Finding(
                section="GPUs",
                name=name,
                status="warns",
                detail=f"{link}, no peer access ({state}): KV between them goes through host memory",
                remedy="use GPUs that `nvidia-smi topo -p2p r` shows as OK",
            )


def _torch() -> Finding:
    try:
        import torch

        usable, version = torch.cuda.is_available(), str(torch.__version__)
    except ImportError:
        usable, version = False, "not installed"
    if usable:
        return Finding(section="GPUs", name="torch", detail=f"{version} can use them")
    return Finding(
        section="GPUs",
        name="torch",
        status="fails",
        detail=f"{version} cannot use them",
        remedy="install a torch built for CUDA, check CUDA_VISIBLE_DEVICES, or set --device cpu",
    )


def _ask(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
