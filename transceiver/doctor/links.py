"""Each transport: whether it works here and how fast it is, to another process of this host or to a peer.

All processes start at once, since that is what takes long; then one link after the other is measured.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.transceiver import packages
from diptych.transceiver.doctor.finding import Finding
from diptych.transceiver.doctor.gpus import has_driver

_PATIENCE_S = 60.0  # a GPU's context and compiled kernels included
_HERE, _THERE = "links here", "links to peer"

# What an end's process says: {"peer": ...}, {"gb_s": ...}, or {"reason": ..., "remedy": ...}.
Answer = dict[str, Any]


class End:
    """One process of ends.py, which gets ready while others do."""

    def __init__(self, role: str, transport: str, device: str, gpu: str) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu} if device == "cuda" else None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "diptych.transceiver.doctor.ends", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.tell(transport=transport, device=device)

    def tell(self, **command: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer, or that there is none, says why
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def answer(self) -> Answer:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _PATIENCE_S)
        line = self._process.stdout.readline() if ready else ""
        if line:
            answer: Answer = json.loads(line)
            return answer
        said = "its process ended without a word" if ready else f"nothing happened within {_PATIENCE_S:g} s"
        return {"reason": said, "remedy": ""}

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


@dataclass(frozen=True, slots=True)
class Way:
    """One transport to be measured. `reader`: None when its package is missing."""

    section: str
    name: str
    reader: End | None
    owner: End | None = None
    peer: str = ""  # instead of an owner of ours

    def measure(self) -> Finding:
        if self.reader is None:
            remedy = packages.missing_package(self.name) or ""
            return Finding(
                section=self.section, name=self.name, status="none", detail="not installed", remedy=remedy
            )
        answer = {"peer": self.peer} if self.owner is None else self.owner.answer()
        if "peer" in answer:
            self.reader.tell(peer=answer["peer"])
            answer = self.reader.answer()
        return _finding(self.section, self.name, answer)


@contextmanager
def local_ways(devices: Sequence[str]) -> Iterator[list[Way]]:
    """Between two processes of this host, with pools on each of the devices, "cpu" or "cuda"."""
    with contextlib.ExitStack() as stack:
        ways: list[Way] = []
        for device in devices:
            gpus = _gpu_pair() if device == "cuda" else ("", "")
            section = _HERE if device == "cpu" else f"GPU {_HERE}"
            for name in ("shm" if device == "cpu" else "cuda_ipc", "tcp", *packages.OPTIONAL):
                if packages.missing_package(name):
                    ways.append(Way(section, name, None))
                    continue
                owner, reader = End("owner", name, device, gpus[0]), End("reader", name, device, gpus[1])
                stack.callback(owner.close)
                stack.callback(reader.close)
                ways.append(Way(section, name, reader, owner))
        yield ways


@contextmanager
def peer_ways(peer: bytes, names: Sequence[str]) -> Iterator[list[Way]]:
    """To the owner of that description, over each of these transports."""
    with contextlib.ExitStack() as stack:
        ways: list[Way] = []
        for name in names:
            reader = None
            if packages.missing_package(name) is None:
                device = "cuda" if has_driver() and name != "shm" else "cpu"
                reader = End("reader", name, device, _gpu_pair()[1])
                stack.callback(reader.close)
            ways.append(Way(_THERE, name, reader, peer=peer.hex()))
        yield ways


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
