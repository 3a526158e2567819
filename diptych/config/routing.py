"""How a router section chooses workers: policies and their options, where possible TensorRT-LLM's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from diptych.config.decode import decode
from diptych.config.sections import NonNegativeInt, PositiveFloat, PositiveInt
from diptych.errors import ConfigError

NonNegativeFloat = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRobinOptions:
    session_affinity: bool = True  # requests with a session header go to the session's worker


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalancingOptions:
    session_affinity: bool = True
    use_tokens: bool = False  # load is the prompt tokens in flight, not the requests


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheAwareOptions:
    session_affinity: bool = True
    use_tokens: bool = False
    load_weight: NonNegativeFloat | None = None  # None: 0.25, with use_tokens 1
    load_cap: PositiveFloat | None = None  # more load than this counts as this much
    max_batch_size: PositiveInt = 64  # a worker with so many requests is passed over while another has fewer
    tokens_per_block: PositiveInt | None = None  # of workers that do not say theirs; None: 32
    track_routed_blocks: bool = True  # count on blocks that a routed request is about to bring
    tokenizer_dir: str | None = None  # None: `model`, or where the workers say that theirs is


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionalDisagg:
    """A prompt of which little is left to compute skips the context leg."""

    max_local_prefill_length: NonNegativeInt = 0


PolicyOptions = RoundRobinOptions | LoadBalancingOptions | KvCacheAwareOptions

OPTIONS: Mapping[str, type[RoundRobinOptions] | type[LoadBalancingOptions] | type[KvCacheAwareOptions]] = {
    "round_robin": RoundRobinOptions,
    "load_balancing": LoadBalancingOptions,
    "kv_cache_aware": KvCacheAwareOptions,
}


def policy_options(name: str, options: Mapping[str, Any], *, source: str) -> PolicyOptions:
    """The options of the policy `name`, checked; `source` says in errors where they are written."""
    kind = OPTIONS.get(name)
    if kind is None:
        known = ", ".join(sorted(OPTIONS))
        raise ConfigError(f"{source}: type {name!r} does not exist; there is: {known}", param="router.type")
    return decode(options, kind, source=source)
