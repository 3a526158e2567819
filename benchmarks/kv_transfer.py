"""How fast KV blocks move between two engine processes on this host, beside what the host can do at all.

    python benchmarks/kv_transfer.py [--rounds 9] [--output benchmarks/results/kv_transfer.json]

Blocks have the layout of SmolLM2-135M; their ids are scrambled on both sides. A fetch is timed from the call
of `Transceiver.fetch` to its event (total), and inside the copy (wire). In the same rounds, interleaved:
memcpy of one contiguous buffer of the same size, and the same bytes asked for and sent in one piece over a
plain socket between the same two processes (with the kernel's and with large buffers; the better one is the
floor). Every fetch is checked byte for byte, outside the timing. nixl and ucx are there when they are installed.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from diptych.kv_layout import KvLayout
from diptych.transceiver.packages import missing_package
from diptych.transceiver.pool_memory import PoolMemory
from diptych.transceiver.settings import FetchDone, LeaseEnded, TransceiverSettings
from diptych.transceiver.transceiver import Transceiver

LAYOUT = KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, tokens_per_block=32, model="SmolLM2-135M")
NUM_BLOCKS = 512
TOKENS = (128, 512, 2048, 8192)
FLOORS = {"shm": "memcpy", "nixl": "memcpy", "tcp": "plain socket", "ucx": "plain socket"}
TRANSPORTS = [name for name in FLOORS if missing_package(name) is None]
WAYS = [(transport, digest) for transport in TRANSPORTS for digest in (False, True)]
PATIENCE_S = 60.0
LARGE_BUFFER_BYTES = 4 << 20
REQUEST = struct.Struct("<QQ")  # of the plain sockets: offset and length in the owner's pool


class Engine:
    """A pool and its transceivers, one for each way to fetch."""

    def __init__(self, incarnation: str, seed: int) -> None:
        self.memory = PoolMemory.create(LAYOUT, NUM_BLOCKS, incarnation)
        words = self.memory.data.view(np.uint64)
        words[:] = np.arange(len(words), dtype=np.uint64) * np.uint64(2 * seed + 1)
        self._bell = threading.Event()
        self.transceivers = {
            (transport, digest): Transceiver(
                self.memory,
                LAYOUT,
                TransceiverSettings(backends=(transport,), verify_digest=digest, measure_transports=False),
                wake=self._bell.set,
            )
            for transport, digest in WAYS
        }

    def fetch(self, way: tuple[str, bool], ticket: bytes, destination: list[int]) -> FetchDone:
        transceiver = self.transceivers[way]
        transceiver.fetch(ticket, range(len(destination)), destination)
        while True:
            self._bell.clear()
            for event in transceiver.poll(time.monotonic()):
                if isinstance(event, FetchDone):
                    return event
                raise RuntimeError(f"the fetch failed: {event}")
            if not self._bell.wait(PATIENCE_S):
                raise RuntimeError(f"no event within {PATIENCE_S} s")


def run_owner() -> None:
    """The other process: offers blocks and sends plain bytes as it is told."""
    engine = Engine("owner", seed=1)
    listener = socket.create_server(("127.0.0.1", 0))
    say(port=listener.getsockname()[1], populate_s=engine.memory.populate_s)
    for line in sys.stdin:
        command = json.loads(line)
        if "offer" in command:
            transceiver = engine.transceivers[(command["transport"], command["digest"])]
            for event in transceiver.poll(time.monotonic()):
                assert isinstance(event, LeaseEnded)
            started = time.perf_counter()
            _, ticket = transceiver.offer(command["offer"], command["tokens"])
            say(ticket=ticket.hex(), offer_s=time.perf_counter() - started)
            # What a scheduler does when it reuses a block, so that no digest is remembered.
            engine.memory.generations[command["bump"]] += 1
        elif "accept" in command:
            sock = listener.accept()[0]
            tune(sock, command["accept"])
            threading.Thread(target=serve_plain, args=(sock, engine.memory.data), daemon=True).start()


def serve_plain(sock: socket.socket, data: np.ndarray) -> None:
    while request := sock.recv(REQUEST.size, socket.MSG_WAITALL):
        offset, length = REQUEST.unpack(request)
        sock.sendall(data[offset : offset + length].data)


class Owner:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--owner"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hello = self._hear()
        self.plain = {kind: self._connect(kind) for kind in ("kernel's buffers", "large buffers")}

    def offer(self, way: tuple[str, bool], blocks: list[int], bump: list[int]) -> tuple[bytes, float]:
        tokens = len(blocks) * LAYOUT.tokens_per_block
        self.tell(offer=blocks, tokens=tokens, transport=way[0], digest=way[1], bump=bump)
        answer = self._hear()
        return bytes.fromhex(answer["ticket"]), answer["offer_s"]

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        for sock in self.plain.values():
            sock.close()
        self._process.kill()
        self._process.communicate()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        message: dict[str, Any] = json.loads(self._process.stdout.readline())
        return message

    def _connect(self, kind: str) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.hello["port"]))
        tune(sock, kind)
        self.tell(accept=kind)
        return sock


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def tune(sock: socket.socket, kind: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind == "large buffers":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGE_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LARGE_BUFFER_BYTES)


def memcpy_s(source: np.ndarray, destination: np.ndarray) -> float:
    started = time.perf_counter()
    np.copyto(destination, source)
    return time.perf_counter() - started


def plain_s(sock: socket.socket, offset: int, destination: np.ndarray) -> float:
    view = destination.data
    started = time.perf_counter()
    sock.sendall(REQUEST.pack(offset, len(view)))
    while view:
        view = view[sock.recv_into(view, 0, socket.MSG_WAITALL) :]
    return time.perf_counter() - started


def measure(owner: Owner, reader: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    num_blocks = tokens // LAYOUT.tokens_per_block
    num_bytes = num_blocks * LAYOUT.block_bytes
    rng = np.random.default_rng(tokens)
    theirs = (np.arange(NUM_BLOCKS * LAYOUT.block_bytes // 8, dtype=np.uint64) * np.uint64(3)).view(np.uint8)
    their_blocks = theirs.reshape(NUM_BLOCKS, -1)
    seconds: dict[str, list[float]] = {}

    def note(name: str, took_s: float) -> None:
        seconds.setdefault(name, []).append(took_s)

    for _ in range(rounds):
        first = int(rng.integers(0, NUM_BLOCKS - num_blocks + 1))
        start = first * LAYOUT.block_bytes
        here = reader.memory.data[start : start + num_bytes]
        note("memcpy", memcpy_s(theirs[start : start + num_bytes], here))
        for kind, sock in owner.plain.items():
            note(f"plain socket, {kind}", plain_s(sock, start, here))
        for way in WAYS:
            name = f"{way[0]}{' + digest' if way[1] else ''}"
            source = rng.permutation(NUM_BLOCKS)[:num_blocks].tolist()
            destination = rng.permutation(NUM_BLOCKS)[:num_blocks].tolist()
            ticket, offer_s = owner.offer(way, source, bump=[])
            note(f"offer, {name}", offer_s)
            done = reader.fetch(way, ticket, destination)
            note(f"{name}, total", done.total_s)
            note(f"{name}, wire", done.wire_s)
            if not np.array_equal(reader.memory.blocks[destination], their_blocks[source]):
                raise RuntimeError(f"{name}: wrong bytes")
            owner.offer(way, source[:1], bump=source)
    return {name: summary(times, num_bytes) for name, times in seconds.items()}


def summary(times: list[float], num_bytes: int) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(times) * 1e3, 3),
        "median_gb_s": round(num_bytes / statistics.median(times) / 1e9, 2),
        "best_gb_s": round(num_bytes / min(times) / 1e9, 2),
    }


def with_ratios(result: dict[str, Any]) -> dict[str, Any]:
    plain = max(v["median_gb_s"] for name, v in result.items() if name.startswith("plain socket"))
    floors = {"memcpy": result["memcpy"]["median_gb_s"], "plain socket": plain}
    ratios = {
        name: round(value["median_gb_s"] / floors[FLOORS[transport]], 2)
        for name, value in result.items()
        if (transport := name.replace(",", " ").split()[0]) in FLOORS
    }
    return {"ways": result, "fraction_of_memcpy_or_plain_socket": ratios}


def show(tokens: int, result: dict[str, Any]) -> None:
    megabytes = tokens * LAYOUT.bytes_per_token / 1e6
    print(f"\n{tokens} tokens, {tokens // LAYOUT.tokens_per_block} blocks, {megabytes:.1f} MB")
    ratios = result["fraction_of_memcpy_or_plain_socket"]
    for name, way in result["ways"].items():
        ratio = f"{ratios[name]:5.2f} of its floor" if name in ratios else ""
        speed = f"{way['median_gb_s']:7.2f} {way['best_gb_s']:7.2f}"
        print(f"  {name:32s} {way['median_ms']:9.2f} ms {speed} GB/s (median, best) {ratio}")


def device() -> dict[str, Any]:
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "xxhash": xxhash.VERSION,
        "msgspec": msgspec.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kv_transfer.json")
    parser.add_argument("--owner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.owner:
        run_owner()
        return
    owner, reader = Owner(), Engine("reader", seed=2)
    report: dict[str, Any] = {
        "benchmark": "kv_transfer",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device(),
        "layout": msgspec.to_builtins(LAYOUT) | {"block_bytes": LAYOUT.block_bytes},
        "rounds": options.rounds,
        "populate_s": {"bytes": reader.memory.identity.total_bytes, "seconds": reader.memory.populate_s},
        "tokens": {},
    }
    try:
        measure(owner, reader, TOKENS[-1], 2)  # connections, page tables and caches as in a running server
        for tokens in TOKENS:
            report["tokens"][str(tokens)] = with_ratios(measure(owner, reader, tokens, options.rounds))
            show(tokens, report["tokens"][str(tokens)])
    finally:
        owner.close()
        for transceiver in reader.transceivers.values():
            transceiver.close()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
