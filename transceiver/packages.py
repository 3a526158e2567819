"""Which transports need a package of their own, whether it is installed, and what to install. Imports none of them."""

import importlib.util
from collections.abc import Mapping

# Transport -> the modules of which one is enough; the extra of ours has the transport's name.
_MODULES: Mapping[str, tuple[str, ...]] = {"nixl": ("nixl_cu13", "nixl_cu12"), "ucx": ("ucxx",)}
OPTIONAL = tuple(_MODULES)


def is_installed(transport: str) -> bool:
    modules = _MODULES.get(transport)
    return modules is None or any(importlib.util.find_spec(name) is not None for name in modules)


def remedy(transport: str) -> str:
    """What brings a transport that is not installed."""
    return f"pip install 'diptych[{transport}]'"
