"""The owner's side of following: who wants to hear of which prefill, and what became of those nobody asked for yet.

A prefill has a name that its reader knows before it begins (docs/protocol.md). Notices go out through queues, so
that the step loop never waits for a reader. Knows neither blocks nor leases: tickets are bytes.
"""

import threading
from collections import OrderedDict

from diptych.transceiver.channel import Channel
from diptych.transceiver.connection import Connection
from diptych.transceiver.frames import BadFrame, Follow, Handed, Message, Progress, Unfollow, Withdrawn

_MAX_TICKET_BYTES = 900 << 10  # leaves room for the rest of a frame
_CAPACITY = (
    1024  # ends kept for a reader that asks late; the oldest are forgotten, and their reader falls back
)


class NoticeBoard:
    def __init__(self, timeout_s: float, capacity: int = _CAPACITY) -> None:
        self._timeout_s = timeout_s
        self._capacity = capacity
        self._lock = threading.Lock()
        self._followers: dict[str, Channel] = {}
        self._ends: OrderedDict[str, Handed | Withdrawn] = OrderedDict()

    def is_followed(self, key: str) -> bool:
        return key in self._followers

    def progress(self, notice: Progress) -> None:
        """Only for who is there: a later notice says all that this one does."""
        if len(notice.ticket) > _MAX_TICKET_BYTES:
            return
        with self._lock:
            channel = self._followers.get(notice.key)
            if channel is not None:
                channel.say(notice)

    def end(self, notice: Handed | Withdrawn) -> None:
        """The last word on a prefill; kept for its reader if that has not asked yet."""
        if isinstance(notice, Handed) and len(notice.ticket) > _MAX_TICKET_BYTES:
            notice = Withdrawn(notice.key, f"its ticket has {len(notice.ticket)} bytes")
        with self._lock:
            channel = self._followers.pop(notice.key, None)
            if channel is not None:
                channel.say(notice)
                return
            self._ends[notice.key] = notice
            if len(self._ends) > self._capacity:
                self._ends.popitem(last=False)

    def serve(self, connection: Connection, number: int) -> None:
        """The handler of one reader's connection."""
        channel = Channel(self._timeout_s)
        try:
            channel.run(connection, lambda message: self._take(message, channel))
        finally:
            with self._lock:
                self._followers = {
                    key: other for key, other in self._followers.items() if other is not channel
                }
            channel.close()

    def _take(self, message: Message, channel: Channel) -> None:
        with self._lock:
            if isinstance(message, Follow):
                end = self._ends.pop(message.key, None)
                if end is not None:
                    channel.say(end)
                else:
                    self._followers[message.key] = channel
            elif isinstance(message, Unfollow):
                if self._followers.get(message.key) is channel:
                    del self._followers[message.key]
            else:
                raise BadFrame(f"{type(message).__name__} on a connection for notices")
