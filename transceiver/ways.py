"""The transports of one transceiver, with the pool registered at each."""

import logging
from dataclasses import dataclass

from diptych.transceiver.pool import KvPool
from diptych.transceiver.settings import TransceiverSettings
from diptych.transceiver.transport import Transport, TransportContext, load

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ways:
    transports: dict[str, Transport]
    regions: dict[str, bytes]  # what a peer connects with


def open_ways(settings: TransceiverSettings, context: TransportContext, memory: KvPool) -> Ways:
    """What the settings require, else the reason is raised; and what is optional and works here."""
    ways = Ways({}, {})
    for name in settings.backends:
        _open(name, ways, context, memory)
    for name in settings.optional_backends:
        try:
            _open(name, ways, context, memory)
        except Exception as error:  # foreign libraries fail in many ways, and this one is not needed
            log.warning("KV transport %s is installed, but cannot be used here: %s", name, error)
    return ways


def _open(name: str, ways: Ways, context: TransportContext, memory: KvPool) -> None:
    transport = load(name, context)
    ways.regions[name] = transport.register(memory)
    ways.transports[name] = transport
