"""Sentences that loading a configuration has for the user, each logged once per load."""

import logging

_log = logging.getLogger(__name__)


class Notices:
    def __init__(self) -> None:
        self._said: set[str] = set()

    def warn(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            _log.warning(sentence)
