"""Transports that need a package beside ours: which one, whether it is here, and how to get it.

Knows nothing of what the packages do.
"""

import importlib
import importlib.util
import os
from types import ModuleType

from diptych.errors import StartupError

# Transport -> modules that serve, the first that is there; and how to install one.
_PACKAGES = {
    "nixl": (("nixl_cu13", "nixl_cu12"), "pip install nixl-cu13 (or nixl-cu12, with a torch for CUDA 12)"),
    "ucx": (("ucxx",), "pip install ucxx-cu13 (or ucxx-cu12, with a torch for CUDA 12)"),
}
OPTIONAL = tuple(_PACKAGES)

# Of UCX, which is inside of both packages; whatever the user has set stays.
_UCX_DEFAULTS = {
    # Segments of 8 KiB, its default, halve the speed over TCP.
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    # ucxx would set 8192 for the whole process, with which nixl's reads need the help of the owner.
    "UCX_RNDV_THRESH": "inf",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_LOG_FILE": "stderr",
    "NIXL_LOG_LEVEL": "WARN",
}


def missing_package(transport: str) -> str | None:
    """How to install it; None: it is here, or none is needed."""
    modules, install = _PACKAGES.get(transport, ((), ""))
    if not modules or any(importlib.util.find_spec(module) for module in modules):
        return None
    return install


def load_package(transport: str, submodule: str) -> ModuleType:
    """Raises StartupError, with the way to install it, when it is not here or cannot be imported."""
    modules, install = _PACKAGES[transport]
    found = next((module for module in modules if importlib.util.find_spec(module)), None)
    if found is None:
        raise StartupError(f"KV transport {transport} needs a package that is not here: {install}")
    for name, value in _UCX_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module(f"{found}.{submodule}")
    except ImportError as error:
        raise StartupError(f"KV transport {transport}: {found} cannot be imported: {error}") from error
