"""Lines of several processes on one terminal: each begins with its process's name, in colour on a tty."""

import sys
from collections.abc import Iterable
from typing import TextIO

_COLOURS = (36, 33, 35, 32, 34, 96, 93, 95)


class Console:
    def __init__(self, names: Iterable[str], *, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._names = {name: index for index, name in enumerate(names)}
        self._width = max((len(name) for name in self._names), default=0)
        self._coloured = self._stream.isatty()

    def show(self, name: str, line: str) -> None:
        label = f"{name:<{self._width}} |"
        if self._coloured and name in self._names:
            colour = _COLOURS[self._names[name] % len(_COLOURS)]
            label = f"\x1b[{colour}m{label}\x1b[0m"
        self._stream.write(f"{label} {line}\n")
        self._stream.flush()
