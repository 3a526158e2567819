"""Test modules may import the helpers that lie beside them; what a test does to logging ends with it."""

import logging
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("worker",)]


@pytest.fixture(autouse=True)
def logging_levels():
    loggers = [logging.getLogger(name) for name in (None, "diptych")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
