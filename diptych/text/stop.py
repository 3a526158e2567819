"""Finds stop strings in text that comes in pieces, whatever the cuts between the pieces.

The first stop string to be complete wins; of those completed by the same character, the longest.
"""

from collections.abc import Sequence


class StopStrings:
    """Holds back only the longest end of the text that could still become a stop string."""

    __slots__ = ("_held", "_include_stop", "_stops")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._include_stop = include_stop
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Text that is safe to send, and the stop string that ended it. After a match, feed no more."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = self._find(text)
        if found is not None:
            begin, end = found
            self._held = ""
            return text[: end if self._include_stop else begin], text[begin:end]
        keep = self._start_of_hold(text)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, int] | None:
        spans = [(begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if not spans:
            return None
        end, begin = min(spans)
        return begin, end

    def _start_of_hold(self, text: str) -> int:
        keep = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < keep:
                if stop.startswith(text[at:]):
                    keep = at
                    break
                at = text.find(stop[0], at + 1)
        return keep
