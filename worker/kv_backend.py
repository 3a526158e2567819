"""From cache_transceiver_config.backend and TensorRT-LLM's environment variables to transports.

A backend that the YAML names wins over the environment; DEFAULT names none. One whose package is missing becomes
DEFAULT, with a warning: files written for TensorRT-LLM run as they are. Pure, but for the question which packages
are installed.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from diptych.errors import ConfigError
from diptych.transceiver import packages

log = logging.getLogger(__name__)

_KEY = "cache_transceiver_config.backend"
_TRANSPORTS: Mapping[str, tuple[str, ...]] = {
    "SHM": ("shm",),
    "TCP": ("tcp",),
    "NIXL": ("nixl", "tcp"),  # tcp is for peers that lack the package
    "UCX": ("ucx", "tcp"),
}
_VARIABLES: Mapping[str, str] = {
    f"TRTLLM_USE_{name}_KVCACHE": name for name in ("UCX", "NIXL", "MOONCAKE", "MPI")
}
_ON = ("1", "true", "on", "yes")


@dataclass(frozen=True, slots=True)
class Transports:
    """`required` must work, or the worker does not start; one of `optional` that does not is left out."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    named: bool = False  # somebody chose them: taken in this order, whatever is measured


def choose_transports(backend: str | None, environment: Mapping[str, str]) -> Transports:
    """ConfigError for a backend that this version does not have."""
    name, source = _name(backend or "DEFAULT", environment)
    if name == "DEFAULT":
        return _default()
    transports = _TRANSPORTS.get(name)
    if transports is None:
        raise ConfigError(
            f"{source} asks for {name}, which is not in this version; use DEFAULT (the fastest that reaches "
            f"each peer), or one of {', '.join(_TRANSPORTS)}"
        )
    for remedy in filter(None, map(packages.missing_package, transports)):
        log.warning(
            "%s asks for %s, whose package is not installed (%s): taking the fastest way there is",
            source,
            name,
            remedy,
        )
        return _default()
    return Transports(transports, named=True)


def _default() -> Transports:
    installed = (name for name in packages.OPTIONAL if packages.missing_package(name) is None)
    return Transports(("shm", "tcp"), tuple(installed))


def _name(backend: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """The backend, and who asks for it."""
    asked = {
        variable: name
        for variable, name in _VARIABLES.items()
        if environment.get(variable, "").lower() in _ON and name != backend
    }
    if backend != "DEFAULT" or not asked:
        for variable in asked:
            log.warning("%s is ignored: %s is %s", variable, _KEY, backend)
        return backend, _KEY
    variable, *others = asked
    for other in others:
        log.warning("%s is ignored: %s comes first", other, variable)
    return asked[variable], variable
