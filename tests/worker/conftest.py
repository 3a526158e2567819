"""Fixtures of the worker's tests."""

import pytest
from engine_fakes import build


@pytest.fixture(params=[False, True], ids=["one by one", "overlapped"])
def parts(request):
    """(engine, link, transceiver, scheduler), without and with steps that run ahead."""
    return build(overlap=request.param)[0]
