"""Routing policies: which of the ready workers takes a leg.

A policy sees workers and a `RouteRequest`, never a body, and does no I/O. One instance serves one role.
"""

import random
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from diptych.config.routing import OPTIONS, PolicyOptions
from diptych.router.policies.affinity import SessionAffinity
from diptych.router.policies.request import RouteRequest
from diptych.router.worker_view import WorkerView

_POLICIES = {
    "round_robin": "diptych.router.policies.round_robin:RoundRobin",
    "load_balancing": "diptych.router.policies.load_balancing:LoadBalancing",
    "kv_cache_aware": "diptych.router.policies.kv_cache_aware:KvCacheAware",
}
assert _POLICIES.keys() == OPTIONS.keys()


class RoutingPolicy(Protocol):
    def pick(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        """One of the workers; there is at least one."""

    def started(self, request: RouteRequest, worker: WorkerView) -> None:
        """The leg begins on this worker."""

    def ended(self, request: RouteRequest, worker: WorkerView) -> None:
        """The leg that began there is over, in whichever way."""


def load_policy(name: str, options: PolicyOptions, rng: random.Random) -> RoutingPolicy:
    """`options`: those of this name, from `diptych.config.routing.policy_options`."""
    module, _, attribute = _POLICIES[name].partition(":")
    policy: RoutingPolicy = getattr(import_module(module), attribute)(options, rng)
    return SessionAffinity(policy) if options.session_affinity else policy
