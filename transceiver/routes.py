"""Which transport to try first for each owner, found out by measuring, and what the log says about it.

The configured order holds: each fetch takes the first transport that works. After the first fetch from an owner
each usable one is measured in the background; one that is clearly faster, and again when measured anew a moment
later, comes first from then on. (A single measurement on a busy host says little.) Knows nothing of fetches.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from diptych.errors import TransferError
from diptych.transceiver.stop import Stop
from diptych.transceiver.ticket import OwnerRank
from diptych.transceiver.transport import Transport, Unreachable

log = logging.getLogger(__name__)

_MEASURE_S = 2.0  # for one transport
_AGAIN_S = 1.0  # until a surprise is measured anew
_CLEARLY = 1.5  # times as fast as one that comes before it in the configured order

Speeds = dict[str, float]  # transport -> GB/s, in the configured order; those that could be measured


class Routes:
    def __init__(
        self,
        transports: Mapping[str, Transport],
        *,
        measure: bool,
        probed: Callable[[OwnerRank, str, float], None] = lambda rank, name, gb_s: None,
        again_s: float = _AGAIN_S,
    ) -> None:
        """`probed` is told what was measured of each, in GB/s."""
        self._transports = transports
        self._probed = probed
        self._lock = threading.Lock()
        self._used: dict[str, str] = {}  # incarnation -> transport, for one log line a peer
        self._found: dict[str, list[str]] = {}  # incarnation -> transports in the order that measuring found
        self._again_s = again_s
        self._closing = threading.Event()
        self._measuring = ThreadPoolExecutor(1, thread_name_prefix="kv-measure") if measure else None

    def order(self, rank: OwnerRank) -> list[str]:
        """The transports that both sides have, the one to try first in front."""
        common = [name for name in self._transports if name in rank.transports]
        with self._lock:
            found = self._found.get(rank.incarnation, [])
        return found + [name for name in common if name not in found]

    def use(self, rank: OwnerRank, name: str, reason: str, detours: Sequence[str]) -> None:
        """This transport reached the owner; those of `detours` did not."""
        with self._lock:
            known = self._used.get(rank.incarnation)
            self._used[rank.incarnation] = name
        if known == name:
            return
        because = "; ".join([reason, *(f"not {detour}" for detour in detours)])
        log.info("KV transport to %s:%d = %s, because %s", rank.host, rank.port, name, because)
        if known is None and self._measuring is not None and not self._closing.is_set():
            self._measuring.submit(self._measure, rank)

    def detour(self, rank: OwnerRank, name: str, error: Unreachable) -> None:
        """A warning when the operator would expect this transport to work."""
        with self._lock:
            if rank.incarnation in self._used:
                return
        if error.remedy:
            log.warning(
                "KV transport to %s:%d cannot be %s: %s; to use it, %s",
                rank.host,
                rank.port,
                name,
                error.reason,
                error.remedy,
            )

    def forget(self, incarnation: str) -> None:
        with self._lock:
            self._used.pop(incarnation, None)
            self._found.pop(incarnation, None)

    def close(self) -> None:
        self._closing.set()
        if self._measuring is not None:
            self._measuring.shutdown(wait=True, cancel_futures=True)

    def _measure(self, rank: OwnerRank) -> None:
        rounds = [self._speeds(rank)]
        if rounds[0] and _best(rounds) != next(iter(rounds[0])) and not self._closing.wait(self._again_s):
            rounds.append(self._speeds(rank))
        best = _best(rounds)
        speeds = rounds[-1]
        with self._lock:
            if best is None or rank.incarnation not in self._used:
                return
            self._found[rank.incarnation] = [best, *(name for name in speeds if name != best)]
        for name, speed in speeds.items():
            self._probed(rank, name, speed)
        log.info(
            "KV transport to %s:%d measured: %s; %s comes first",
            rank.host,
            rank.port,
            ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in speeds.items()),
            best,
        )

    def _speeds(self, rank: OwnerRank) -> Speeds:
        speeds: Speeds = {}
        for name, transport in self._transports.items():
            if name not in rank.transports or self._closing.is_set():
                continue
            stop = Stop(_MEASURE_S)
            try:
                speeds[name] = transport.measure(transport.connect(rank.transports[name], stop), stop)
            except (Unreachable, TransferError) as error:
                log.debug("KV transport %s could not be measured: %s", name, error)
            except Exception:
                log.exception("KV transport %s could not be measured, by an error of ours", name)
        return speeds


def _best(rounds: Sequence[Speeds]) -> str | None:
    """The first one, but for those that were clearly faster every time; None: none could be measured."""
    best: str | None = None
    for name in rounds[-1]:
        if best is None or all(speeds.get(name, 0.0) > _CLEARLY * speeds.get(best, 0.0) for speeds in rounds):
            best = name
    return best
