"""What the router needs to know from the configuration, and its own time limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from diptych.config.api_keys import KeySetting
from diptych.config.routing import ConditionalDisagg


class PolicySettings(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


class PoolSettings(Protocol):
    @property
    def router(self) -> PolicySettings: ...


class MinimalSettings(Protocol):
    """How many workers of each role make the mesh ready."""

    @property
    def context_servers(self) -> int: ...
    @property
    def generation_servers(self) -> int: ...


class RouterSettings(Protocol):
    """The part of the disaggregated server's configuration that the router reads."""

    @property
    def hostname(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def context_servers(self) -> PoolSettings: ...
    @property
    def generation_servers(self) -> PoolSettings: ...
    @property
    def model(self) -> str | None: ...
    @property
    def conditional_disagg_config(self) -> ConditionalDisagg | None: ...
    @property
    def schedule_style(self) -> Literal["context_first", "generation_first"]: ...
    @property
    def max_retries(self) -> int: ...
    @property
    def num_workers(self) -> int:
        """Processes that share the port."""

    @property
    def max_concurrent_requests(self) -> int | None:
        """Of all processes together; None: what the workers can use."""

    @property
    def max_queued_requests(self) -> int | None:
        """Of all processes together; None: in proportion to those that run."""

    @property
    def api_keys(self) -> Sequence[KeySetting]:
        """Empty: everybody may ask."""

    @property
    def request_timeout_s(self) -> float: ...
    @property
    def server_start_timeout_s(self) -> float: ...
    @property
    def max_body_bytes(self) -> int: ...
    @property
    def server_keep_alive_timeout(self) -> float: ...
    @property
    def minimal_instances(self) -> "MinimalSettings | None":
        """None: requests are taken from the start."""

    @property
    def cluster_secret(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of single waits, in seconds; a whole request has `request_timeout_s` on top."""

    connect_s: float = 3.0
    idle_s: float = 60.0  # between two reads of one response body
    keep_alive_s: float = 30.0  # an idle connection older than this is not used again
    probe_s: float = 1.0  # two probes in a row that take longer: the worker hangs
    probe_interval_s: float = 1.0  # of a worker that answers
    probe_retry_s: float = 1.0  # of one that does not, at first
    probe_retry_max_s: float = 10.0
    resume_wait_s: float = 10.0  # a begun stream waits so long for a worker to go on with
    release_s: float = 5.0
    shutdown_s: float = 30.0  # for running requests, after SIGTERM
