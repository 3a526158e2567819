"""Every setting, read once into frozen dataclasses.

Files and command-line options come in as plain mappings, are checked against the dataclasses, and leave as
values that nobody changes. What is left open is filled in by `resolve_limits` when the hardware is known.
"""

from diptych.config.cluster import DisaggCluster, MinimalInstances, cluster_from_uri
from diptych.config.disagg import DisaggConfig, RouterSection, ServerSection, load_disagg_config
from diptych.config.limits import Hardware, Limits, resolve_limits
from diptych.config.llm import LlmConfig, load_llm_config
from diptych.config.metadata import MetadataConfig, load_metadata_config
from diptych.config.sections import CacheTransceiverConfig, KvCacheConfig, SchedulerConfig

__all__ = [
    "CacheTransceiverConfig",
    "DisaggCluster",
    "DisaggConfig",
    "Hardware",
    "KvCacheConfig",
    "Limits",
    "LlmConfig",
    "MetadataConfig",
    "MinimalInstances",
    "RouterSection",
    "SchedulerConfig",
    "ServerSection",
    "cluster_from_uri",
    "load_disagg_config",
    "load_llm_config",
    "load_metadata_config",
    "resolve_limits",
]
