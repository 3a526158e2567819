"""Workers come, go and die through a real registry, with real processes; no client notices."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import aiohttp
import orjson
import pytest
from mesh import get, wait_for

from tests.fakes.ports import free_port

PREFIX = "/trtllm/default/workers/"
BODY = {"prompt": "The sea", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def complete(url, **fields):
    """One request, for tests that need no event loop; its answer."""
    request = urllib.request.Request(
        f"{url}/v1/completions", orjson.dumps({**BODY, **fields}), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return orjson.loads(response.read())


class Traffic:
    """One request after the other from a thread, until the end of the block; every one must succeed."""

    def __init__(self, url):
        self.url = url
        self.answers, self.errors = 0, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._stop.is_set():
            try:
                complete(self.url)
                self.answers += 1
            except OSError as error:
                self.errors.append(f"{error}: {getattr(error, 'read', bytes)()!r}")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(60)

    def wait_more(self, count, timeout_s=30.0):
        start = self.answers
        wait_for(f"{count} more answers", lambda: self.answers >= start + count or self.errors, timeout_s)


def state_of(etcd, server):
    """What etcd says of a worker: (its key, its value)."""
    for key, value in etcd.keys(PREFIX).items():
        if value["url"].endswith(f":{server.port}"):
            return key, value
    return None, {}


def announced(etcd, server, state="READY"):
    wait_for(
        f"{server.name} {state} in etcd", lambda: state_of(etcd, server)[1].get("state", "READY") == state, 60
    )


def served(server):
    """How many requests a worker has ended; a kind of end that never was has no line."""
    text = get(f"{server.url}/prometheus/metrics") or ""
    lines = [line for line in text.splitlines() if line.startswith("trtllm_request_success_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.fixture
def meshed(fresh):
    """etcd, a context and a generation worker, and a router that only etcd tells of them."""
    etcd = fresh.etcd()
    metadata = fresh.metadata(etcd, health_check_timeout=3.0, refersh_interval=5.0)
    context = fresh.worker("context", "CONTEXT", metadata=metadata)
    generation = fresh.worker("generation", "GENERATION", metadata=metadata)
    router = fresh.router("router", [], [], metadata=metadata)
    for server in (context, generation, router):
        server.wait_ready()
    return etcd, metadata, context, generation, router


def exit_code(server, timeout_s=30.0):
    return wait_for(
        f"{server.name} ended",
        lambda: (server.process.poll() is not None) and (server.process.poll(),),
        timeout_s,
    )[0]


def test_a_late_worker_takes_traffic_within_a_second_of_ready(fresh, meshed):
    etcd, metadata, _, _, router = meshed
    with Traffic(router.url) as traffic:
        late = fresh.worker("late", "GENERATION", metadata=metadata)
        wait_for("late in etcd", lambda: state_of(etcd, late)[0], 60)
        wait_for("late READY in etcd", lambda: state_of(etcd, late)[1].get("state", "READY") == "READY", 60)
        ready = time.monotonic()
        wait_for("late serves", lambda: served(late) > 0, 10)
        elapsed = time.monotonic() - ready
    assert traffic.errors == []
    assert elapsed < 1.0, elapsed
    assert f"Server http://127.0.0.1:{late.port} is added" in router.log.read_text()


def test_a_key_deleted_by_hand_drains_the_worker(fresh, meshed):
    etcd, metadata, _, generation, router = meshed
    other = fresh.worker("other", "GENERATION", metadata=metadata).wait_ready()
    wait_for("both generation workers", lambda: ready_count(router) == 2, 10)
    with Traffic(router.url) as traffic:
        traffic.wait_more(4)
        key, _ = state_of(etcd, generation)
        assert etcd.delete(key)
        message = f"Server http://127.0.0.1:{generation.port} is removed"
        wait_for(message, lambda: message in router.log.read_text(), 5)
        assert exit_code(generation) == 0
        traffic.wait_more(4)
    assert traffic.errors == []
    assert served(other) > 0
    assert state_of(etcd, generation)[0] is None
    assert "deleted from etcd by somebody else" in generation.log.read_text()


def ready_count(router, role="generation_servers"):
    workers = get(f"{router.url}/cluster_info")["current_workers"][role]
    return sum(worker["state"] == "READY" for worker in workers)


async def stream_through(session, url, begun, **fields):
    """The texts of one stream, and whether it ended well."""
    texts = []
    async with session.post(f"{url}/v1/completions", json={**BODY, **fields, "stream": True}) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                event = orjson.loads(line[6:])
                assert "error" not in event, event
                texts.append(event["choices"][0]["text"])
                if len(texts) == 3:
                    begun.set()
            elif line.strip() == b"data: [DONE]":
                return texts, True
    return texts, False


async def test_sigterm_under_a_running_stream(meshed):
    etcd, _, _, generation, router = meshed
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        begun = asyncio.Event()
        call = asyncio.create_task(stream_through(session, router.url, begun, max_tokens=300))
        await asyncio.wait_for(begun.wait(), 60)
        generation.process.terminate()
        await asyncio.to_thread(announced, etcd, generation, "DRAINING")
        assert not call.done()
        async with session.post(f"{generation.url}/v1/completions", json=BODY) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
        texts, whole = await call
    assert whole
    assert "".join(texts) == complete_alone(generation, meshed)
    assert exit_code(generation) == 0
    assert state_of(etcd, generation)[0] is None


def test_sigterm_while_the_model_loads(fresh):
    etcd = fresh.etcd()
    worker = fresh.worker("worker", "CONTEXT", metadata=fresh.metadata(etcd))
    wait_for("STARTING in etcd", lambda: state_of(etcd, worker)[1].get("state") == "STARTING", 60)
    worker.process.terminate()
    assert exit_code(worker) == 0
    assert state_of(etcd, worker)[0] is None


async def test_a_drain_has_an_end(fresh):
    worker = fresh.worker("worker", drain_timeout_s=0.5).wait_ready()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        body = {**BODY, "max_tokens": 4000, "stream": True}
        async with session.post(f"{worker.url}/v1/completions", json=body) as response:
            await response.content.readline()
            worker.process.terminate()
            whole = await response.read()
    assert b'"error"' in whole
    assert whole.endswith(b"data: [DONE]\n\n")
    assert exit_code(worker) == 0
    assert "drain_timeout_s (0.5 s) is over: 1 requests" in worker.log.read_text()


def complete_alone(generation, meshed):
    """The same answer from the context worker alone: it can do both legs."""
    return complete(meshed[2].url, max_tokens=300)["choices"][0]["text"]


def test_the_drain_command(fresh, meshed):
    etcd, metadata, _, generation, router = meshed
    other = fresh.worker("other", "GENERATION", metadata=metadata).wait_ready()
    wait_for("both generation workers", lambda: ready_count(router) == 2, 10)
    with Traffic(router.url) as traffic:
        result = drain(generation.url)
        assert result.returncode == 0, result.stderr
        assert f"{generation.url} drains" in result.stdout
        assert exit_code(generation) == 0
        traffic.wait_more(2)
    assert traffic.errors == []
    unknown = drain("nobody", "-m", str(metadata))
    assert unknown.returncode == 2
    assert "no worker 'nobody' is registered" in unknown.stderr
    worker_id = state_of(etcd, other)[1]["worker_id"]
    assert drain(worker_id, "-m", str(metadata)).returncode == 0
    assert exit_code(other) == 0


def drain(*arguments):
    command = [sys.executable, "-m", "diptych.cli", "drain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_traffic_flows_while_etcd_is_killed_and_restarted(meshed):
    etcd, _, context, generation, router = meshed
    with Traffic(router.url) as traffic:
        traffic.wait_more(2)
        etcd.kill()
        down = time.monotonic()
        wait_for("the lease time to pass", lambda: time.monotonic() - down > 5.0, 10)
        traffic.wait_more(2)
        etcd.start()
        for server in (context, generation):
            announced(etcd, server)
        etcd.wipe()
        etcd.start()
        for server in (context, generation):
            wait_for(f"{server.name} in etcd again", lambda server=server: state_of(etcd, server)[0], 10)
        traffic.wait_more(2)
    assert traffic.errors == []
    assert "is removed" not in router.log.read_text()


def test_a_killed_worker_is_marked_down(fresh, meshed):
    etcd, metadata, _, generation, router = meshed
    other = fresh.worker("other", "GENERATION", metadata=metadata).wait_ready()
    wait_for("both generation workers", lambda: ready_count(router) == 2, 10)
    generation.kill()
    wait_for("one generation worker", lambda: ready_count(router) == 1, 5)
    wait_for("the dead one's key gone", lambda: state_of(etcd, generation)[0] is None, 10)
    complete(router.url)
    assert served(other) > 0


def test_a_registry_in_the_router(fresh):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    cluster = {
        "cluster_uri": uri,
        "minimal_instances": {"context_servers": 1, "generation_servers": 2},
        "heartbeat_interval_sec": 0.5,
        "inactive_interval_sec": 2,
    }
    router = fresh.router("router", [], [], port=port, disagg_cluster=cluster)
    context = fresh.worker("context", "CONTEXT", cluster_uri=uri)
    first = fresh.worker("first", "GENERATION", cluster_uri=uri)
    for server in (context, first):
        server.wait_ready()
    wait_for("one generation worker", lambda: ready_count(router) == 1, 10)
    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(router.url)
    assert refused.value.code == 503
    assert int(refused.value.headers["Retry-After"]) >= 1
    assert b"1 of 2 generation workers are ready" in refused.value.read()
    assert get(f"{router.url}/health") is None
    second = fresh.worker("second", "GENERATION", cluster_uri=uri).wait_ready()
    router.wait_ready()
    complete(router.url)
    second.kill()
    wait_for("the killed one is gone", lambda: f":{second.port} is removed" in router.log.read_text(), 10)
    complete(router.url)  # what was ready once is used as long as it can be
    assert get(f"{router.url}/health") is None
    assert first.stop() == 0
    with contextlib.suppress(OSError):
        complete(router.url)
    assert f"Server {first.url} is removed" in router.log.read_text()
