"""The owner's process of kv-bench: JSON lines in, JSON lines out.

first line    {"layouts": {name: [KvLayout, ...]}, "num_blocks": {name: n}, "device": "cuda"}
{"offer": name, "blocks": [...], "tokens": n, "transport": ..., "digest": ...}   a ticket for all its ranks
{"region": name, "transport": ...}                                              where its first rank is
{"burn": seconds}                                                               bring the GPU to its clock
"""

import json
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

import msgspec
import numpy as np

from diptych.kv_layout import KvLayout
from diptych.transceiver import ticket as tickets
from diptych.transceiver.bench.burn import burn
from diptych.transceiver.bench.engine import Engine, fill, settings_of
from diptych.transceiver.host_region import HostRegion

REQUEST = struct.Struct("<Q")  # of the plain socket: so many bytes, please
_PLAIN_BYTES = 64 << 20


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    device = setup["device"]
    engines: dict[str, list[Engine]] = {}
    for name, layouts in setup["layouts"].items():
        ranks = [msgspec.convert(layout, KvLayout) for layout in layouts]
        count = setup["num_blocks"][name]
        engines[name] = [
            Engine(rank, count, f"{name} {rank.tp_rank} {os.getpid()}", device) for rank in ranks
        ]
        for engine in engines[name]:
            fill(engine.memory)
    _say(port=_serve_plain())
    for line in sys.stdin:
        command = json.loads(line)
        if "offer" in command:
            _say(**_offer(engines[command["offer"]], command))
        elif "region" in command:
            _say(region=HostRegion.of(engines[command["region"]][0].memory).encode().hex())
        elif "reuse" in command:
            for engine in engines[command["reuse"]]:
                engine.reuse_all()
            _say(done=True)
        elif device == "cuda":
            burn(command["burn"])
            _say(done=True)


def _offer(ranks: list[Engine], command: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(command["transport"], digest=command["digest"], programs=command["programs"])
    for rank in ranks:
        rank.transceiver(settings)
    started = time.perf_counter()
    offers = [rank.offer(settings, command["blocks"], command["tokens"]) for rank in ranks]
    took_s = time.perf_counter() - started
    joined = tickets.join([tickets.decode(offer) for offer in offers]) if len(offers) > 1 else None
    return {"ticket": (tickets.encode(joined) if joined else offers[0]).hex(), "offer_s": took_s}


def _serve_plain() -> int:
    listener = socket.create_server(("127.0.0.1", 0))
    data = np.ones(_PLAIN_BYTES, np.uint8)

    def serve() -> None:
        connection = listener.accept()[0]
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := connection.recv(REQUEST.size, socket.MSG_WAITALL):
            left = REQUEST.unpack(request)[0]
            while left:
                connection.sendall(data[: min(left, len(data))].data)
                left -= min(left, len(data))

    threading.Thread(target=serve, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def _say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
