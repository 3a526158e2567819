"""Transports that need a package: without it, or with a broken one, they say how to get it."""

import os
import subprocess
import sys

import pytest
from kv_nodes import Node, needs_package

from diptych.errors import StartupError
from diptych.transceiver import packages


@pytest.fixture(params=["nixl", "ucx"])
def without(request, monkeypatch) -> str:
    """The transport whose package is not here."""
    monkeypatch.setattr(packages, "_PACKAGES", {request.param: (("no_such_module",), "pip install it")})
    return request.param


def test_a_missing_package_is_an_error_with_the_way_to_install_it(without):
    assert packages.missing_package(without) == "pip install it"
    with pytest.raises(StartupError, match=f"KV transport {without} needs a package .*: pip install it"):
        Node(backends=("tcp", without))


def test_our_own_transports_need_none():
    assert [packages.missing_package(name) for name in ("shm", "tcp", "cuda_ipc")] == [None, None, None]


def test_a_package_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("raise ImportError('no libwhatever.so')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "_PACKAGES", {"ucx": (("broken_package",), "pip install it")})
    with pytest.raises(StartupError, match=r"broken_package cannot be imported: no libwhatever\.so"):
        packages.load_package("ucx", "core")


FETCH = """
import sys
sys.path.insert(0, {folder!r})
from kv_nodes import Node
owner, reader = Node(seed=1, backends=({way!r},)), Node(seed=2, backends=({way!r},))
done = reader.result(reader.transceiver.fetch(owner.offer([1])[1], [0], [0]))
print(done.message if hasattr(done, "message") else "done")
{end}
"""


def run(way: str, end: str = "reader.close(); owner.close()", **environment: str):
    code = FETCH.format(folder=os.path.dirname(__file__), way=way, end=end)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_package("nixl")
def test_nixl_is_refused_where_its_reads_would_need_the_owners_help():
    result = run("nixl", UCX_TLS="tcp")
    assert "nixl cannot read its memory without its help" in result.stdout, result.stderr
    assert result.returncode == 0


@pytest.mark.parametrize("way", [pytest.param(way, marks=needs_package(way)) for way in ("nixl", "ucx")])
def test_a_process_that_ends_by_an_error_does_not_crash(way):
    result = run(way, end="raise SystemExit(7)")
    assert result.stdout == "done\n", "libraries must not write to stdout"
    assert result.returncode == 7, result.stderr


@needs_package("nixl")
@needs_package("ucx")
def test_one_process_may_use_both():
    """ucxx would set a variable of UCX's under which nixl's reads need the owner's help."""
    code = "from diptych.transceiver.packages import load_package\nload_package('ucx', '_lib.libucxx')\n"
    result = subprocess.run(
        [sys.executable, "-c", code + FETCH.format(folder=os.path.dirname(__file__), way="nixl", end="")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout == "done\n", result.stderr
