"""From the configuration to a registry: etcd, the router's own, the list of URLs, or two of them merged."""

import math

from diptych.config import DisaggCluster, DisaggConfig, MetadataConfig
from diptych.discovery import Registry
from diptych.discovery.embedded import EmbeddedRegistry
from diptych.discovery.embedded_client import RemoteRegistry
from diptych.discovery.merged import MergedRegistry
from diptych.discovery.static import StaticRegistry
from diptych.trust import ClusterTrust


def router_registry(config: DisaggConfig) -> Registry:
    """What the router watches. Must be called inside the event loop."""
    listed = StaticRegistry.from_urls(config.context_servers.urls, config.generation_servers.urls)
    cluster = config.disagg_cluster
    if cluster is not None and cluster.is_embedded:
        registry: Registry = EmbeddedRegistry(
            heartbeat_interval_s=cluster.heartbeat_interval_sec,
            inactive_timeout_s=cluster.inactive_timeout_sec,
        )
    elif cluster is not None or config.metadata_server is not None:
        registry = _etcd(config.metadata_server, cluster)
    else:
        return listed
    return MergedRegistry(listed, registry)


def member_registry(
    metadata: MetadataConfig | None, cluster: DisaggCluster | None, trust: ClusterTrust
) -> Registry | None:
    """Where a worker registers; None when it is told of no place. Must be called inside the event loop."""
    if cluster is not None and cluster.is_embedded:
        return RemoteRegistry(cluster.endpoints[0], headers=trust.headers())
    if cluster is None and metadata is None:
        return None
    return _etcd(metadata, cluster)


def registry_endpoint(metadata: MetadataConfig | None, cluster: DisaggCluster | None) -> str | None:
    """The base URL of the registry, or of the first of several."""
    if cluster is not None:
        return cluster.endpoints[0]
    return None if metadata is None else metadata.urls[0]


def _etcd(metadata: MetadataConfig | None, cluster: DisaggCluster | None) -> Registry:
    from diptych.discovery.etcd import EtcdRegistry
    from diptych.discovery.etcd_client import EtcdAddress
    from diptych.discovery.etcd_lease import Timing

    if cluster is not None:
        timing = Timing(
            ttl_s=_lease_s(cluster.inactive_timeout_sec), heartbeat_s=cluster.heartbeat_interval_sec
        )
        return EtcdRegistry(
            EtcdAddress(endpoints=cluster.endpoints), cluster=cluster.cluster_name, timing=timing
        )
    assert metadata is not None
    address = EtcdAddress(
        endpoints=metadata.urls,
        user=metadata.user,
        password=metadata.password,
        ca_file=metadata.ca_file,
        cert_file=metadata.cert_file,
        key_file=metadata.key_file,
    )
    timing = Timing(
        ttl_s=_lease_s(metadata.health_check_timeout), refresh_interval_s=metadata.refresh_interval
    )
    return EtcdRegistry(address, cluster=metadata.cluster_name, timing=timing)


def _lease_s(seconds: float) -> int:
    return max(2, math.ceil(seconds))  # whole seconds, and etcd's least
