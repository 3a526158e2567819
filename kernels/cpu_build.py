"""Compiles the C++ of the CPU kernels once per machine and opens the library.

The result is kept in a cache folder under a name that hashes the sources, the compiler, its flags and the
CPU, so a changed source or another machine on a shared home folder gets its own build. Two processes may
build at once: each writes its own file and renames it into place. Knows nothing of what the library does.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 300.0
EXPECTED_COMPILE_S = 5
_SOURCE_FOLDER = Path(__file__).resolve().parent / "csrc"
_BASE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")


class KernelUnavailable(Exception):
    """The CPU kernels cannot be used here; the message says why. Callers fall back to torch."""


def cache_folder() -> Path:
    if chosen := os.environ.get("DIPTYCH_CACHE_DIR"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "diptych"
    try:
        return Path("~/.cache/diptych").expanduser()
    except RuntimeError as error:
        raise KernelUnavailable("there is no home folder for the build; set DIPTYCH_CACHE_DIR") from error


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX when set, else the first of c++, g++, clang++ on the path."""
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise KernelUnavailable(
            f"CXX is {chosen!r}, which is no program on this machine; unset it or name a compiler"
        )
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise KernelUnavailable("no C++ compiler was found; install g++ or clang++, or set CXX")


def load(source: str, *, portable: bool) -> ctypes.CDLL:
    """The library built from csrc/`source`; `portable` leaves out the newest vector instructions."""
    path = build(source, portable=portable)
    try:
        return _open(path)
    except OSError as error:
        raise KernelUnavailable(f"the compiled library {path} cannot be opened: {error}") from error


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def build(source: str, *, portable: bool) -> Path:
    """Path of the built library, compiling it if no earlier build fits."""
    compiler = find_compiler()
    flags = [*_BASE_FLAGS, f"-march={_architecture(portable)}"]
    path = cache_folder() / f"{Path(source).stem}-{_key(compiler, flags)}.so"
    if not path.exists():
        _compile(compiler, flags, _SOURCE_FOLDER / source, path)
    return path


def _architecture(portable: bool) -> str:
    return "x86-64-v3" if portable and platform.machine() in ("x86_64", "AMD64") else "native"


def _key(compiler: list[str], flags: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=10)
    for path in sorted(_SOURCE_FOLDER.glob("cpu_*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(_run([*compiler, "--version"]).encode())
    digest.update("\0".join([*compiler, *flags, platform.machine(), _cpu_flags()]).encode())
    return digest.hexdigest()


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(compiler: list[str], flags: list[str], source: Path, path: Path) -> None:
    logger.info("Compiling the CPU kernels (once, about %d s)", EXPECTED_COMPILE_S)
    start = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    except OSError as error:
        raise KernelUnavailable(f"the cache folder {path.parent} cannot be written: {error}") from error
    os.close(handle)
    try:
        _run([*compiler, *flags, str(source), "-o", unfinished])
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    logger.debug("compiled %s in %.1f s", path, time.monotonic() - start)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"the compiler could not be run: {error}") from error
    if done.returncode:
        reason = next(
            (line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:]
        )
        raise KernelUnavailable(f"{command[0]} ended with status {done.returncode}: {reason}")
    return done.stdout
