"""Each transport: whether it works here and how fast it is, to another process of this host or to a peer."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych.transceiver import packages
from diptych.transceiver.doctor.finding import Finding
from diptych.transceiver.doctor.gpus import has_driver

_START_S = 60.0  # a GPU's context and compiled kernels included
_READ_S = 60.0
_HERE, _THERE = "links here", "links to peer"

# What an end's process says: {"peer": ...}, {"gb_s": ...}, or {"reason": ..., "remedy": ...}.
Answer = dict[str, Any]


def local_links(device: str) -> Iterator[Finding]:
    """Between two processes of this host, with pools on `device`: "cpu" or "cuda"."""
    owner_gpu, reader_gpu = _gpu_pair() if device == "cuda" else ("", "")
    section = _HERE if device == "cpu" else f"GPU {_HERE}"
    for name in ("shm" if device == "cpu" else "cuda_ipc", "tcp", *packages.OPTIONAL):
        if remedy := packages.remedy(name):
            yield _not_installed(section, name, remedy)
            continue
        with _owner(name, device, owner_gpu) as answer:
            if "peer" in answer:
                answer = _measured(name, device, answer["peer"], reader_gpu)
            yield _finding(section, name, answer)


def peer_links(peer: bytes, names: list[str]) -> Iterator[Finding]:
    """To the owner of that description, over each of these transports."""
    for name in names:
        if remedy := packages.remedy(name):
            yield _not_installed(_THERE, name, remedy)
            continue
        device = "cuda" if has_driver() and name != "shm" else "cpu"
        yield _finding(_THERE, name, _measured(name, device, peer.hex(), _gpu_pair()[1]))


@contextmanager
def _owner(name: str, device: str, gpu: str) -> Iterator[Answer]:
    """Another process with a pool, as long as the context lasts."""
    process = subprocess.Popen(
        _end("owner"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=_environment(device, gpu),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"transport": name, "device": device}) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], _START_S)
        yield _answer(process.stdout.readline()) if ready else _silent(_START_S)
    finally:
        process.kill()
        process.communicate()


def _measured(name: str, device: str, peer: str, gpu: str) -> Answer:
    command = json.dumps({"transport": name, "device": device, "peer": peer})
    try:
        done = subprocess.run(
            _end("reader"),
            input=command + "\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=_READ_S,
            check=False,
            env=_environment(device, gpu),
        )
    except subprocess.TimeoutExpired:
        return _silent(_READ_S)
    return _answer(done.stdout)


def _end(name: str) -> list[str]:
    return [sys.executable, "-m", "diptych.transceiver.doctor.ends", name]


def _environment(device: str, gpu: str) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if device == "cuda" else dict(os.environ)


def _answer(line: str) -> Answer:
    if not line:
        return {"reason": "its process ended without a word", "remedy": ""}
    answer: Answer = json.loads(line)
    return answer


def _silent(seconds: float) -> Answer:
    return {"reason": f"nothing happened within {seconds:g} s", "remedy": ""}


def _not_installed(section: str, name: str, remedy: str) -> Finding:
    return Finding(section=section, name=name, status="none", detail="not installed", remedy=remedy)


def _finding(section: str, name: str, answer: Answer) -> Finding:
    if "gb_s" in answer:
        speed = answer["gb_s"]
        return Finding(section=section, name=name, detail=f"{speed:.1f} GB/s", gb_s=round(speed, 2))
    return Finding(
        section=section, name=name, status="warns", detail=answer["reason"], remedy=answer["remedy"]
    )


def _gpu_pair() -> tuple[str, str]:
    """The owner's and the reader's GPU; the same one when there is only one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        visible = ",".join(sorted(path.name[6:] for path in Path("/dev").glob("nvidia[0-9]*")))
    found = [name for name in visible.split(",") if name] or [""]
    return found[0], found[min(1, len(found) - 1)]
