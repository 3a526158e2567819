"""etcd's faults, one by one, on a real etcd: what readers see and what workers do."""

import asyncio
import json
import subprocess
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from diptych.discovery.etcd import EtcdRegistry
from diptych.discovery.etcd_client import EtcdAddress, EtcdClient, EtcdRefused, EtcdUnreachable, Item
from diptych.discovery.etcd_lease import EtcdLease
from diptych.errors import ConfigError
from tests.diptych.discovery.conftest import TIMING, EtcdWorld
from tests.diptych.discovery.test_conformance import worker
from tests.fakes.ports import free_port
from tests.fakes.real_etcd import Etcd

READERS_TTL_S = 2.0


@asynccontextmanager
async def world_of(etcd: Etcd, cluster: str = "c"):
    world = EtcdWorld(etcd, cluster)
    try:
        yield world
    finally:
        await world.close()


async def test_the_key_and_its_value(shared_etcd: Etcd):
    async with world_of(shared_etcd, "the key") as world:
        lease = await world.writer().register(worker("host:8001-a1", load={"running": 2.0}))
        keys = shared_etcd.keys("/trtllm/the key/workers/")
        await lease.close()
    assert list(keys) == ["/trtllm/the key/workers/host:8001-a1"]
    [value] = keys.values()
    assert value == {
        "worker_id": "host:8001-a1",
        "url": "http://127.0.0.1:1",
        "role": "CONTEXT",
        "model": "m",
        "incarnation": "a",
        "load": {"running": 2.0},
    }
    assert shared_etcd.keys("/trtllm/the key/workers/") == {}


async def test_a_killed_etcd_removes_nobody_and_the_watch_goes_on(own_etcd: Etcd):
    async with world_of(own_etcd) as world:
        registry, reader = world.writer(), world.reader()
        lease = await registry.register(worker())
        await reader.until("w:1-a")
        own_etcd.kill()
        started = time.monotonic()
        late = await world.writer().register(worker("w:2-b"))  # does not fail, and does not wait for etcd
        await lease.update(worker(state="DRAINING"))
        assert time.monotonic() - started < 2.0
        await asyncio.sleep(READERS_TTL_S + 1.0)  # longer than the lease: this is the time that must pass
        assert [[info.worker_id for info in shown] for shown in reader.snapshots if shown] == [["w:1-a"]]
        own_etcd.start()
        states = {"w:1-a": "DRAINING", "w:2-b": "READY"}
        await reader.until_shown(lambda shown: {info.worker_id: info.state for info in shown} == states)
        assert all(shown for shown in reader.snapshots[1:])
        await late.close()
        await reader.until("w:1-a")


async def test_a_wiped_etcd_loses_nobody(own_etcd: Etcd):
    async with world_of(own_etcd) as world:
        registry, reader = world.writer(), world.reader()
        lease = await registry.register(worker())
        gone = await registry.register(worker("w:2-b"))
        await reader.until("w:1-a", "w:2-b")
        seen = len(reader.snapshots)
        await world.crash(gone)
        own_etcd.wipe()
        own_etcd.start()
        await reader.until("w:1-a")  # the dead one is kept for one lease time, the living one for ever
        assert all("w:1-a" in [info.worker_id for info in shown] for shown in reader.snapshots[seen:])
        [value] = own_etcd.keys(world.prefix).values()
        assert value["incarnation"] == "a"
        assert not lease.removed.is_set()


async def test_a_lease_that_ends_between_its_renewal_and_the_look_at_its_key_is_made_again(own_etcd: Etcd):
    class Client(EtcdClient):
        looks = 0

        async def get(self, key: str, timeout_s: float) -> Item | None:
            self.looks += 1
            if self.looks == 1:
                await asyncio.to_thread(own_etcd.end_leases, key)
            return await super().get(key, timeout_s)

    client = Client(EtcdAddress(endpoints=(own_etcd.url,)))
    lease = EtcdLease(client, "/trtllm/c/workers/w:1-a", worker(), TIMING)
    async with world_of(own_etcd) as world:
        reader = world.reader()
        await reader.until("w:1-a")
        await reader.until()
        await reader.until("w:1-a")
        assert client.looks
        assert not lease.removed.is_set()
    await lease.close()
    await client.close()


async def test_a_stopped_etcd_removes_nobody(own_etcd: Etcd):
    async with world_of(own_etcd) as world:
        registry, reader = world.writer(), world.reader()
        lease = await registry.register(worker())
        await reader.until("w:1-a")
        own_etcd.pause()
        await lease.update(worker(state="DRAINING"))
        await asyncio.sleep(READERS_TTL_S + 1.0)  # longer than the lease
        assert reader.snapshots[-1] == (worker(),)
        own_etcd.resume()
        await reader.until("w:1-a", state="DRAINING")
        assert not lease.removed.is_set()


async def test_compaction_under_a_watch(own_etcd: Etcd):
    async with world_of(own_etcd) as world:
        registry, reader = world.writer(), world.reader()
        lease = await registry.register(worker())
        await reader.until("w:1-a")
        for number in range(20):
            await lease.update(worker(load={"running": float(number)}))
            await asyncio.to_thread(own_etcd.put, "/other", str(number))
            await asyncio.to_thread(own_etcd.compact)
        await registry.register(worker("w:2-b"))
        await reader.until("w:1-a", "w:2-b")


async def test_a_watch_from_a_compacted_revision_is_refused(own_etcd: Etcd):
    client = EtcdClient(EtcdAddress(endpoints=(own_etcd.url,)))
    for number in range(5):
        own_etcd.put("/a/x", str(number))
    own_etcd.compact()
    with pytest.raises(EtcdRefused, match="compacted"):
        await anext(client.watch("/a/", 2, 1.0))
    await client.close()


async def test_a_lease_that_ended_is_replaced_with_the_same_incarnation(shared_etcd: Etcd):
    async with world_of(shared_etcd, "ended") as world:
        lease = await world.writer().register(worker())
        client = EtcdClient(EtcdAddress(endpoints=(shared_etcd.url,)))
        item = await client.get(world.prefix + "w:1-a", 1.0)
        assert item is not None
        await client.revoke(item.lease_id, 1.0)  # as after a pause of this process: the key is gone with it
        reader = world.reader()
        await reader.until("w:1-a", incarnation="a")
        await client.close()
        assert not lease.removed.is_set()


async def test_a_key_written_over_by_hand_is_put_right(shared_etcd: Etcd):
    async with world_of(shared_etcd, "over") as world:
        lease = await world.writer().register(worker())
        reader = world.reader()
        await reader.until("w:1-a")
        await asyncio.to_thread(shared_etcd.put, world.prefix + "w:1-a", "oops")
        await reader.until()
        await reader.until("w:1-a")
        assert not lease.removed.is_set()


async def test_keys_that_are_no_workers_are_ignored(shared_etcd: Etcd, caplog: pytest.LogCaptureFixture):
    async with world_of(shared_etcd, "odd") as world:
        await world.writer().register(worker())
        shared_etcd.put(world.prefix + "junk", "{")
        shared_etcd.put(
            world.prefix + "x", json.dumps({"worker_id": "y", "url": "http://h:1", "role": "CONTEXT"})
        )
        shared_etcd.put(
            world.prefix + "z", json.dumps({"worker_id": "z", "url": "http://h:1", "role": "KING"})
        )
        await world.reader().until("w:1-a")
    assert {key for key in ("junk", "/x ", "/z ") if key in caplog.text} == {"junk", "/x ", "/z "}


async def test_two_clusters_in_one_etcd(shared_etcd: Etcd):
    async with world_of(shared_etcd, "one") as one, world_of(shared_etcd, "one-b") as other:
        await one.writer().register(worker())
        await other.writer().register(worker("w:2-b"))
        await one.reader().until("w:1-a")
        await other.reader().until("w:2-b")


async def test_etcd_down_at_the_start(etcd_program: None, tmp_path: Path):
    etcd = Etcd(tmp_path)
    async with world_of(etcd) as world:
        registry, reader = world.writer(), world.reader()
        await asyncio.wait_for(registry.register(worker()), 5.0)
        assert reader.snapshots == []
        await asyncio.to_thread(etcd.start)
        await reader.until("w:1-a")
    etcd.kill()


async def test_leaving_while_etcd_is_down_is_quick(own_etcd: Etcd):
    async with world_of(own_etcd) as world:
        lease = await world.writer().register(worker())
        own_etcd.kill()
        await asyncio.wait_for(lease.close(), 3.0)


async def test_several_endpoints(own_etcd: Etcd):
    dead = f"http://127.0.0.1:{free_port()}"
    registry = EtcdRegistry(EtcdAddress(endpoints=(dead, own_etcd.url)), cluster="c", timing=TIMING)
    async with world_of(own_etcd) as world:
        await registry.register(worker())
        await world.reader(registry).until("w:1-a")
        await registry.close()


async def test_an_unreachable_etcd_is_named(etcd_program: None):
    dead = f"http://127.0.0.1:{free_port()}"
    client = EtcdClient(EtcdAddress(endpoints=(dead,)))
    with pytest.raises(EtcdUnreachable, match=dead):
        await client.read_prefix("/a/", 1.0)
    await client.close()


async def test_user_and_password(own_etcd: Etcd):
    for path, body in (
        ("user/add", {"name": "root", "password": "r"}),
        ("user/add", {"name": "mesh", "password": "s"}),
        ("role/add", {"name": "root"}),
        ("role/add", {"name": "mesh"}),
        ("user/grant", {"user": "root", "role": "root"}),
        ("user/grant", {"user": "mesh", "role": "mesh"}),
        (
            "role/grant",
            {
                "name": "mesh",
                "perm": {"permType": "READWRITE", "key": "L3RydGxsbS8=", "range_end": "L3RydGxsbTA="},
            },
        ),
        ("auth/enable", {}),
    ):
        own_etcd.ask(f"/v3/auth/{path}".replace("auth/auth", "auth"), **body)
    address = EtcdAddress(endpoints=(own_etcd.url,), user="mesh", password="s")
    registry = EtcdRegistry(address, timing=TIMING)
    refused = EtcdClient(EtcdAddress(endpoints=(own_etcd.url,), user="mesh", password="wrong"))
    async with world_of(own_etcd) as world:
        with pytest.raises(EtcdRefused, match="authentication failed"):
            await refused.read_prefix("/trtllm/", 1.0)
        lease = await registry.register(worker())
        reader = world.reader(registry)
        await reader.until("w:1-a")
        own_etcd.kill()  # its tokens go with it
        await asyncio.to_thread(own_etcd.start)
        await lease.update(worker(state="DRAINING"))
        await reader.until("w:1-a", state="DRAINING")
        await lease.close()
        await reader.until()
        await registry.close()
    await refused.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates for etcd and for us."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=authority"
    )
    for name, subject in (("etcd", "/O=test"), ("us", "/CN=us")):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        # etcd's gateway is a client of etcd itself: its certificate must be good for both sides.
        uses = "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n"
        (folder / f"{name}.ext").write_text(uses)
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", f"{name}.pem", "-days", "2", "-extfile", f"{name}.ext"),
        )
    return folder


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls(etcd_program: None, certificates: Path, tmp_path: Path, mutual: bool):
    ca, cert, key = (str(certificates / name) for name in ("ca.pem", "etcd.pem", "etcd.key"))
    arguments = ["--cert-file", cert, "--key-file", key]
    if mutual:
        arguments += ["--client-cert-auth", "--trusted-ca-file", ca]
    etcd = await asyncio.to_thread(Etcd(tmp_path, *arguments).start)
    ours = (
        {"cert_file": str(certificates / "us.pem"), "key_file": str(certificates / "us.key")}
        if mutual
        else {}
    )
    registry = EtcdRegistry(EtcdAddress(endpoints=(etcd.url,), ca_file=ca, **ours), timing=TIMING)
    stranger = EtcdClient(EtcdAddress(endpoints=(etcd.url,), ca_file=ca if mutual else None))
    async with world_of(etcd) as world:
        await registry.register(worker())
        reader = world.reader(registry)
        await reader.until("w:1-a")
        with pytest.raises(EtcdUnreachable, match=r"(?i)certificate|ssl|reset"):
            await stranger.read_prefix("/a/", 1.0)
        await registry.close()
    await stranger.close()
    etcd.kill()


def test_certificate_files_that_cannot_be_read():
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        EtcdClient(EtcdAddress(endpoints=("https://h:1",), ca_file="absent.pem"))
