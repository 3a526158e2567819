"""Routing policies: which of the ready workers takes a leg.

A policy sees workers and never requests' bodies. One instance serves one role.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from diptych.errors import ConfigError
from diptych.router.pool import WorkerView

_POLICIES = {
    "round_robin": "diptych.router.policies.round_robin:RoundRobin",
}


class RoutingPolicy(Protocol):
    def pick(self, candidates: Sequence[WorkerView]) -> WorkerView:
        """One of the candidates; there is at least one."""


def load_policy(name: str) -> RoutingPolicy:
    path = _POLICIES.get(name)
    if path is None:
        known = ", ".join(sorted(_POLICIES))
        raise ConfigError(f"router.type {name!r} does not exist; there is: {known}.", param="router.type")
    module, _, attribute = path.partition(":")
    policy: RoutingPolicy = getattr(import_module(module), attribute)()
    return policy
