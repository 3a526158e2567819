"""What a stream has brought so far, in tokens: enough for another worker to go on with it (docs/protocol.md).

Each chunk of a journaled stream begins with one line, which is a comment to a reader of server-sent events:

    : 0=5,7@32;1=9!stop/2\n     choice=token ids[@cached prompt tokens][!how the engine ended it[/stop token]]
    : end\n                     what follows is the last of the stream

Workers write the lines, the router keeps them and reads them only when a worker fails. Pure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

HEADER = "X-Diptych-Journal"  # "1": of a request that wants a journal, and of the response that has one
END = b": end\n"


class JournalError(ValueError):
    """A line that no worker writes."""


class Entry(msgspec.Struct, frozen=True):
    """What one chunk brings for one choice. A stop string is no end: it shows in the tokens."""

    index: int
    token_ids: Sequence[int] = ()
    cached_tokens: int | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class ChoiceSoFar:
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class StreamSoFar:
    """`ended`: the client has all of it."""

    choices: dict[int, ChoiceSoFar] = field(default_factory=dict)
    ended: bool = False


def journal_line(entries: Iterable[Entry]) -> bytes:
    return f": {';'.join(map(_write, entries))}\n".encode()


def read_journal(lines: bytes | bytearray) -> StreamSoFar:
    """All lines of a stream, in order. Raises JournalError."""
    stream = StreamSoFar()
    for line in bytes(lines).decode("ascii", "replace").splitlines():
        if not line.startswith(": "):
            raise JournalError(f"a journal line is {line[:32]!r}")
        if line == ": end":
            stream.ended = True
            continue
        for entry in filter(None, line[2:].split(";")):
            try:
                _read(entry, stream)
            except ValueError:
                raise JournalError(f"a journal entry is {entry[:32]!r}") from None
    return stream


def _write(entry: Entry) -> str:
    text = f"{entry.index}={','.join(map(str, entry.token_ids))}"
    if entry.cached_tokens is not None:
        text += f"@{entry.cached_tokens}"
    if entry.finish_reason is not None:
        text += f"!{entry.finish_reason}"
        if entry.stop_token_id is not None:
            text += f"/{entry.stop_token_id}"
    return text


def _read(entry: str, stream: StreamSoFar) -> None:
    rest, _, end = entry.partition("!")
    rest, _, cached = rest.partition("@")
    index, equals, token_ids = rest.partition("=")
    if not equals:
        raise ValueError
    choice = stream.choices.setdefault(int(index), ChoiceSoFar())
    choice.token_ids += [int(token_id) for token_id in token_ids.split(",") if token_id]
    if cached:
        choice.cached_tokens = int(cached)
    if end:
        choice.finish_reason, _, stop_token = end.partition("/")
        choice.stop_token_id = int(stop_token) if stop_token else None
