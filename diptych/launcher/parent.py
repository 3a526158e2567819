"""Ties a process to the one that started it: when the parent ends, even by SIGKILL, so does the child."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """SIGTERM on the parent's death, so that a worker can still stop its own engine processes."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        return  # a kernel that refuses; the launcher still stops its children when it ends normally
    if os.getppid() != parent_pid:  # it died before the request was in place
        raise SystemExit(1)
