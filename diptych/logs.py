"""Logging of a process: TensorRT-LLM's level names and one line format. Called where a process begins."""

import logging
from collections.abc import Mapping

_LEVELS: Mapping[str, int] = {
    "internal_error": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "verbose": logging.DEBUG,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
LEVEL_NAMES: tuple[str, ...] = tuple(_LEVELS)


def level(name: str) -> int:
    return _LEVELS[name]


def configure(level_name: str) -> None:
    """To stderr; our loggers at the level asked for, third parties at warning unless tracing."""
    third_party = logging.DEBUG if level_name == "trace" else max(logging.WARNING, level(level_name))
    logging.basicConfig(
        level=third_party, format="%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger().setLevel(third_party)
    logging.getLogger("diptych").setLevel(level(level_name))
