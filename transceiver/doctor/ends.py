"""The two ends of a measured link, each a process of its own: a library that hangs or crashes takes only that along.

python -m diptych.transceiver.doctor.ends owner     {"transport", "device"} on standard input;
    {"peer": hex} on standard output; ends with standard input
python -m diptych.transceiver.doctor.ends reader    {"transport", "device"}, then {"peer"} on standard input;
    {"gb_s"} or {"reason", "remedy"} on standard output
"""

import json
import os
import secrets
import sys
from typing import Any

from diptych.errors import DiptychError
from diptych.kv_layout import KvLayout
from diptych.transceiver.bench.engine import make_pool
from diptych.transceiver.server import Server
from diptych.transceiver.settings import TransceiverSettings
from diptych.transceiver.stop import Stop
from diptych.transceiver.ticket import decode_rank, encode_rank
from diptych.transceiver.transceiver import Transceiver
from diptych.transceiver.transport import TransportContext, Unreachable, load
from diptych.trust import ClusterTrust

MEASURE_S = 10.0
# Blocks of 512 KiB, in a pool that is larger than the caches of most CPUs.
LAYOUT = KvLayout(num_layers=8, num_kv_heads=4, head_dim=128, tokens_per_block=32, model="doctor")
NUM_BLOCKS = 128


def open_owner(transports: tuple[str, ...], device: str, bind_host: str) -> Transceiver:
    settings = TransceiverSettings(
        backends=transports, bind_host=bind_host, measure_transports=False, secret=ClusterTrust(None).secret
    )
    pool = make_pool(LAYOUT, NUM_BLOCKS, secrets.token_hex(8), device)
    return Transceiver(pool, LAYOUT, settings, wake=lambda: None)


def _own(command: dict[str, Any]) -> None:
    owner = open_owner((command["transport"],), command["device"], "127.0.0.1")
    _say(peer=encode_rank(owner.describe()).hex())
    sys.stdin.read()


def _read(command: dict[str, Any]) -> None:
    name = command["transport"]
    pool = make_pool(LAYOUT, NUM_BLOCKS, secrets.token_hex(8), command["device"])
    secret = ClusterTrust(None).secret
    server = Server(incarnation=pool.identity.incarnation)
    transport = load(name, TransportContext(server, secret.encode() if secret else None))
    transport.register(pool)
    server.start()
    # The slow part is done, beside the owner's.
    rank = decode_rank(bytes.fromhex(json.loads(sys.stdin.readline())["peer"]))
    stop = Stop(MEASURE_S)
    peer = transport.connect(rank.transports[name], stop)
    _say(gb_s=max(transport.measure(peer, stop) for _ in range(3)))


def _say(**answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    command = json.loads(sys.stdin.readline())
    try:
        {"owner": _own, "reader": _read}[sys.argv[1]](command)
    except Unreachable as error:
        _say(reason=error.reason, remedy=error.remedy or "")
    except DiptychError as error:
        _say(reason=error.message, remedy="")
    except Exception as error:
        _say(reason=f"{type(error).__name__}: {error}", remedy="")
    sys.stdout.flush()
    os._exit(0)  # foreign libraries' threads do not hold up the end


if __name__ == "__main__":
    main()
