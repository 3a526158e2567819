"""Which registry a configuration means."""

import pytest

from diptych.config import DisaggCluster, DisaggConfig, MetadataConfig, ServerSection
from diptych.discovery.connect import member_registry, registry_endpoint, router_registry
from diptych.discovery.embedded import EmbeddedRegistry
from diptych.discovery.embedded_client import RemoteRegistry
from diptych.discovery.etcd import EtcdRegistry
from diptych.discovery.merged import MergedRegistry
from diptych.discovery.static import StaticRegistry
from diptych.trust import ClusterTrust

ETCD, ROUTER = DisaggCluster(cluster_uri="etcd://a:1,b:2"), DisaggCluster(cluster_uri="http://r:8000/")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (DisaggConfig(disagg_cluster=ETCD), EtcdRegistry),
        (DisaggConfig(disagg_cluster=ROUTER), EmbeddedRegistry),
        (DisaggConfig(metadata_server=MetadataConfig()), EtcdRegistry),
    ],
)
async def test_of_the_router(config: DisaggConfig, kind: type):
    registry = router_registry(config)
    assert isinstance(registry, MergedRegistry)
    assert isinstance(registry.registry, kind)
    await registry.close()


async def test_of_a_router_with_a_list_only():
    section = ServerSection(urls=("localhost:1",))
    assert isinstance(router_registry(DisaggConfig(context_servers=section)), StaticRegistry)


@pytest.mark.parametrize(
    ("metadata", "cluster", "kind", "endpoint"),
    [
        (None, None, type(None), None),
        (MetadataConfig(hostname="e"), None, EtcdRegistry, "http://e:2379"),
        (None, ETCD, EtcdRegistry, "http://a:1"),
        (None, ROUTER, RemoteRegistry, "http://r:8000"),
    ],
)
async def test_of_a_worker(metadata, cluster, kind: type, endpoint: str | None):
    registry = member_registry(metadata, cluster, ClusterTrust(None))
    assert isinstance(registry, kind)
    assert registry_endpoint(metadata, cluster) == endpoint
    if registry is not None:
        await registry.close()
