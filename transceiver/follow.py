"""The reader's side of following: one connection to each owner, on which it tells how prefills go on.

Every follow ends in exactly one `PrefillHanded` or `FollowEnded`, unless `unfollow` was called before. Nothing
here waits for an owner: connections are made and read by threads of their own. Knows no deadlines: who follows
decides how long.
"""

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from diptych.errors import TransferError
from diptych.transceiver.channel import Channel
from diptych.transceiver.connection import dial
from diptych.transceiver.frames import BadFrame, Follow, Handed, Message, Progress, Unfollow, Withdrawn
from diptych.transceiver.settings import FollowEnded, FollowEvent, PrefillHanded, PrefillProgress
from diptych.transceiver.stop import Stop

log = logging.getLogger(__name__)

_DIAL_S = 5.0
_CLOSE_S = 2.0


@dataclass(frozen=True, slots=True)
class OwnerAddress:
    """Where an owner's transceiver listens, and which process that must be; written `host:port/incarnation`."""

    host: str
    port: int
    incarnation: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}/{self.incarnation}"

    @classmethod
    def parse(cls, text: str) -> "OwnerAddress":
        place, _, incarnation = text.partition("/")
        host, _, port = place.rpartition(":")
        if not (host and incarnation and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise TransferError(f"KV owner {text!r} is not host:port/incarnation", code="layout")
        return cls(host, int(port), incarnation)


class Follows:
    """All follows of one transceiver. `post` is called from background threads, also from `follow`'s."""

    def __init__(
        self, *, secret: bytes | None, timeout_s: float, post: Callable[[FollowEvent], None]
    ) -> None:
        self._secret = secret
        self._timeout_s = timeout_s
        self._post = post
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._links: dict[OwnerAddress, _Link] = {}
        self._open: dict[int, tuple[_Link, str]] = {}

    def follow(self, owner: str, key: str) -> int:
        follow_id = next(self._ids)
        try:
            address = OwnerAddress.parse(owner)
        except TransferError as error:
            self._post(FollowEnded(follow_id, error.message))
            return follow_id
        with self._lock:
            link = self._links.get(address)
            if link is None:
                link = self._links[address] = _Link(
                    address, self._secret, self._timeout_s, take=self._take, gone=self._gone
                )
            self._open[follow_id] = (link, key)
            link.keys[key] = follow_id
            link.channel.say(Follow(key))  # a link that is about to go ends this follow, too
        return follow_id

    def unfollow(self, follow_id: int) -> None:
        with self._lock:
            link, key = self._open.pop(follow_id, (None, ""))
            if link is not None and link.keys.get(key) == follow_id:
                del link.keys[key]
                link.channel.say(Unfollow(key))

    def close(self) -> None:
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close()

    def _take(self, link: "_Link", notice: Progress | Handed | Withdrawn) -> None:
        with self._lock:
            follow_id = link.keys.get(notice.key)
            if follow_id is not None and not isinstance(notice, Progress):
                del link.keys[notice.key], self._open[follow_id]
        if follow_id is None:
            return  # unfollowed meanwhile
        match notice:
            case Progress():
                self._post(PrefillProgress(follow_id, notice.content, notice.num_tokens, notice.ticket))
            case Handed():
                self._post(PrefillHanded(follow_id, notice.content, notice.ticket or None, notice.note))
            case Withdrawn():
                self._post(FollowEnded(follow_id, notice.reason))

    def _gone(self, link: "_Link", reason: str) -> None:
        with self._lock:
            if self._links.get(link.address) is link:
                del self._links[link.address]
            lost = list(link.keys.values())
            link.keys.clear()
            for follow_id in lost:
                del self._open[follow_id]
        for follow_id in lost:
            self._post(FollowEnded(follow_id, reason))


class _Link:
    """The connection to one owner. `keys` belongs to `Follows`, and so does its lock."""

    def __init__(
        self,
        address: OwnerAddress,
        secret: bytes | None,
        timeout_s: float,
        *,
        take: Callable[["_Link", Progress | Handed | Withdrawn], None],
        gone: Callable[["_Link", str], None],
    ) -> None:
        self.address = address
        self.keys: dict[str, int] = {}
        self.channel = Channel(timeout_s)
        self._secret = secret
        self._dialling = Stop(_DIAL_S)
        self._take = take
        self._gone = gone
        self._thread = threading.Thread(target=self._run, name="kv-follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._dialling.abort()
        self.channel.end()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        reason = "this transceiver is closing"
        try:
            address = (self.address.host, self.address.port)
            connection = dial(address, "notices", self.address.incarnation, self._secret, self._dialling)
            try:
                self.channel.run(connection, self._hear)
            finally:
                connection.close()
        except (TransferError, OSError, BadFrame) as error:
            reason = f"the KV owner at {self.address.host}:{self.address.port} is gone: {error}"
            log.info("%s", reason)
        except Exception:
            reason = "an error of ours"
            log.exception("KV notices from %s ended by an error of ours", self.address)
        finally:
            self.channel.close()
            self._gone(self, reason)

    def _hear(self, message: Message) -> None:
        if not isinstance(message, Progress | Handed | Withdrawn):
            raise BadFrame(f"{type(message).__name__} from an owner")
        self._take(self, message)
