"""A mesh with a cluster secret: legs, releases and the KV channel need it; clients never see it."""

import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import orjson
from mesh import MODEL, Mesh

from diptych.trust import HEADER

SECRET = "not to be guessed"
BODY = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


def post(url: str, body: object, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(
        url, orjson.dumps(body), {"Content-Type": "application/json", **headers}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, orjson.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, orjson.loads(error.read())


def test_a_secret_guards_what_is_between_router_and_workers(fresh: Mesh):
    context = fresh.worker("context", "CONTEXT", cluster_secret=SECRET)
    generation = fresh.worker("generation", "GENERATION", cluster_secret=SECRET)
    router = fresh.router("router", [context], [generation], cluster_secret=SECRET, api_keys=["client"])
    for server in (context, generation, router):
        server.wait_ready()
    leg = {**BODY, "disaggregated_params": {"request_type": "context_only", "disagg_request_id": "1"}}
    for headers in ({}, {HEADER: "guessed"}, {HEADER: "\u00e9"}):
        status, answer = post(f"{context.url}/v1/completions", leg, **headers)
        assert (status, answer["error"]["code"]) == (403, "forbidden")
        for url in (f"{context.url}/kv/release", f"{context.url}/drain", f"{context.url}/role"):
            status, answer = post(url, {"ticket_ids": []}, **headers)
            assert (status, answer["error"]["code"]) == (403, "forbidden")
    status, alone = post(f"{context.url}/v1/completions", BODY)
    assert status == 200  # a worker is a server of its own
    status, _ = post(f"{router.url}/v1/completions", BODY)
    assert status == 401
    status, both = post(f"{router.url}/v1/completions", BODY, Authorization="Bearer client")
    assert status == 200
    assert both["choices"][0]["text"] == alone["choices"][0]["text"]
    # The blocks went over the channel that proves the secret; without it the worker would compute them again.
    assert generation.metric("diptych_kv_fetches_total") == 1
    for server in (context, generation, router):
        assert SECRET not in server.log.read_text()


def test_a_router_with_another_secret_is_refused(fresh: Mesh):
    context = fresh.worker("context", "CONTEXT", cluster_secret=SECRET)
    router = fresh.router("router", [context], [context], cluster_secret="another")
    for server in (context, router):
        server.wait_ready()
    status, answer = post(f"{router.url}/v1/completions", BODY)
    assert (status, answer["error"]["code"]) == (403, "forbidden")


def test_a_worker_with_a_full_line_says_so(fresh: Mesh):
    worker = fresh.worker("worker", max_batch_size=1, max_queue_size=1)
    worker.wait_ready()
    long = {**BODY, "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post(f"{worker.url}/v1/completions", long), range(6)))
    refused = [answer for status, answer in answers if status == 429]
    assert sum(status == 200 for status, _ in answers) == 2
    assert len(refused) == 4
    assert all(answer["error"]["code"] == "overloaded" for answer in refused)
    assert post(f"{worker.url}/v1/completions", BODY)[0] == 200
