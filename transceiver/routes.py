"""Which transport to try first for each owner, found out by measuring, and what the log says about it.

The first fetch from an owner takes the first of the configured transports that works; meanwhile each usable one
is measured in the background, and from then on the fastest comes first, of those that are as fast the one that
was configured first. Knows nothing of fetches.
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
_AS_FAST = 0.8  # of the fastest: less than one measurement can tell


class Routes:
    def __init__(
        self,
        transports: Mapping[str, Transport],
        *,
        measure: bool,
        probed: Callable[[OwnerRank, str, float], None] = lambda rank, name, gb_s: None,
    ) -> None:
        """`probed` is told each measurement, in GB/s."""
        self._transports = transports
        self._probed = probed
        self._lock = threading.Lock()
        self._used: dict[str, str] = {}  # incarnation -> transport, for one log line a peer
        self._speeds: dict[str, dict[str, float]] = {}  # incarnation -> transport -> GB/s
        self._closing = Stop(float("inf"))
        self._measuring = ThreadPoolExecutor(1, thread_name_prefix="kv-measure") if measure else None

    def order(self, rank: OwnerRank) -> list[str]:
        """The transports that both sides have, the one to try first in front."""
        common = [name for name in self._transports if name in rank.transports]
        with self._lock:
            speeds = self._speeds.get(rank.incarnation, {})
        enough = _AS_FAST * max(speeds.values(), default=0.0)
        first = [name for name in common if speeds.get(name, 0.0) >= enough][:1]
        return first + sorted(
            set(common) - set(first), key=lambda name: (-speeds.get(name, 0.0), common.index(name))
        )

    def use(self, rank: OwnerRank, name: str, reason: str, detours: Sequence[str]) -> None:
        """This transport reached the owner; those of `detours` did not."""
        with self._lock:
            known = self._used.get(rank.incarnation)
            self._used[rank.incarnation] = name
        if known == name:
            return
        because = "; ".join([reason, *(f"not {detour}" for detour in detours)])
        log.info("KV transport to %s:%d = %s, because %s", rank.host, rank.port, name, because)
        if known is None and self._measuring is not None and not self._closing.aborted:
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
            self._speeds.pop(incarnation, None)

    def close(self) -> None:
        self._closing.abort()
        if self._measuring is not None:
            self._measuring.shutdown(wait=True, cancel_futures=True)

    def _measure(self, rank: OwnerRank) -> None:
        speeds: dict[str, float] = {}
        for name in self.order(rank):
            if self._closing.aborted:
                return
            transport, stop = self._transports[name], Stop(_MEASURE_S)
            try:
                speeds[name] = transport.measure(transport.connect(rank.transports[name], stop), stop)
            except (Unreachable, TransferError) as error:
                log.debug("KV transport %s could not be measured: %s", name, error)
            except Exception:
                log.exception("KV transport %s could not be measured, by an error of ours", name)
        with self._lock:
            if not speeds or rank.incarnation not in self._used:
                return
            self._speeds[rank.incarnation] = speeds
        for name, speed in speeds.items():
            self._probed(rank, name, speed)
        best, *others = sorted(speeds, key=lambda name: -speeds[name])
        beside = "".join(f", {name} {speeds[name]:.1f}" for name in others)
        log.info(
            "KV transport to %s:%d measured: %s %.1f GB/s%s", rank.host, rank.port, best, speeds[best], beside
        )
