"""Transport over TCP: the owner sends spans straight from its pool (or, from a GPU, through staging.py).

Works wherever the owner's port can be reached, and needs nothing installed.
"""

from diptych.transceiver.stream import StreamTransport
from diptych.transceiver.transport import TransportContext
from diptych.transceiver.wires import Connections


class TcpTransport(StreamTransport):
    def __init__(self, context: TransportContext) -> None:
        super().__init__("tcp", Connections("data"), context)
