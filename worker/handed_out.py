"""Which tickets each context leg gave away, so that a router can return those whose answer never reached it.

A router that ends a context leg (its client went away) does not know whether the answer was on its way: it
names the request, and whatever tickets the request got, or gets yet, are returned. Pure.
"""

from collections import OrderedDict
from collections.abc import Sequence

_CAPACITY = 8192  # the oldest are forgotten: their leases have ended long ago

RequestKey = str | int


class HandedOut:
    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._tickets: OrderedDict[RequestKey, Sequence[str] | None] = OrderedDict()  # None: revoked before

    def add(self, key: RequestKey, ticket_ids: Sequence[str]) -> Sequence[str]:
        """Note what a leg gives away; the result is what must be returned at once."""
        if key in self._tickets and self._tickets[key] is None:
            return ticket_ids
        self._note(key, ticket_ids)
        return ()

    def revoke(self, key: RequestKey) -> Sequence[str]:
        """The tickets of a request that nobody wants any more; what it gets later comes back by `add`."""
        ticket_ids = self._tickets.get(key) or ()
        self._note(key, None)
        return ticket_ids

    def _note(self, key: RequestKey, ticket_ids: Sequence[str] | None) -> None:
        self._tickets[key] = ticket_ids
        self._tickets.move_to_end(key)
        if len(self._tickets) > self._capacity:
            self._tickets.popitem(last=False)
