"""benchmarks/serve.py against small servers of known behaviour."""

import argparse
import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from serve import measure, parse_arguments, parse_target
from serving.load import Load, drive
from serving.prompts import PromptSource
from serving.request import Record
from serving.summary import distribution, ratios, summarise, table


class Words:
    """A tokenizer of whole words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        return ids

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[token] for token in ids)


class Server:
    """Streams numbered words; refuses, fails, or stops short as told."""

    def __init__(
        self,
        *,
        refuses: tuple[str, ...] = (),
        fails_at: int | None = None,
        short: int = 0,
        usage: bool = True,
        ends: bool = True,
    ) -> None:
        self.refuses, self.fails_at, self.short = refuses, fails_at, short
        self.usage, self.ends = usage, ends
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        for name in self.refuses:
            if name in body:
                return web.json_response({"error": {"message": f"unknown field {name}"}}, status=400)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._stream(request, body)
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)

        async def send(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        count = body["max_tokens"] - self.short
        for index in range(count):
            if index == self.fails_at:
                await send({"error": {"message": "worker lost"}})
                return response
            await send({"choices": [{"text": f" {index}"}]})
            await asyncio.sleep(0)
        if self.usage:
            await send({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}})
        if self.ends:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})


Start = Callable[[Server], Any]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    runners: list[web.AppRunner] = []

    async def start(server: Server) -> str:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", server.complete), web.get("/v1/models", server.models)])
        runner = web.AppRunner(app, access_log=None)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


def options(urls: dict[str, str], *arguments: str) -> argparse.Namespace:
    targets = [part for name, url in urls.items() for part in ("--target", f"{name}={url}")]
    lengths = ("--output-len", "4", "--rounds", "2", "--num-requests", "6", "--warmup", "1")
    return parse_arguments([*targets, *lengths, *arguments])


async def test_two_targets_in_turns(start: Start):
    servers = {"a": Server(), "b": Server()}
    urls = {name: await start(server) for name, server in servers.items()}
    result = await measure(options(urls, "--concurrency", "1,3"))
    assert [load["concurrency"] for load in result["loads"]] == [1, 3]
    for load in result["loads"]:
        for name in servers:
            figures = load["results"][name]
            assert figures["requests"] == 12
            assert figures["errors"] == {}
            assert figures["wrong_length"] == 0
            assert figures["output_tokens"] == 48
            assert figures["tokens_counted_by"] == "server"
            assert figures["ttft_ms"]["p50"] <= figures["e2e_ms"]["p50"]
        assert load["results"]["b"]["ratio_to_first"]["output_tokens_per_s"] > 0
        assert "ratio_to_first" not in load["results"]["a"]
    assert result["targets"][0]["model"] == "tiny"
    assert result["machine"]["cores"] > 0
    for server in servers.values():
        assert server.most_running == 3
    # Both got the same prompts, and no two prompts of a server were equal.
    measured = [[body["prompt"] for body in server.bodies[2:]] for server in servers.values()]
    assert sorted(measured[0]) == sorted(measured[1])
    assert len(set(measured[0])) == 24


async def test_fields_that_a_server_refuses_are_left_out(start: Start):
    server = Server(refuses=("min_tokens",))
    result = await measure(options({"a": await start(server)}, "--concurrency", "1"))
    assert result["targets"][0]["extra"] == {"ignore_eos": True}
    assert result["loads"][0]["results"]["a"]["errors"] == {}


async def test_suppressed_tokens(start: Start):
    server = Server()
    await measure(
        options({"a": await start(server)}, "--concurrency", "1", "--suppress-token", "2", "--allow-eos")
    )
    assert server.bodies[-1]["logit_bias"] == {"2": -100}
    assert "ignore_eos" not in server.bodies[-1]


async def test_without_usage_events_are_counted(start: Start):
    result = await measure(options({"a": await start(Server(usage=False))}, "--concurrency", "2"))
    figures = result["loads"][0]["results"]["a"]
    assert figures["tokens_counted_by"] == "events"
    assert figures["output_tokens"] == 48


async def test_short_answers_are_counted(start: Start):
    result = await measure(options({"a": await start(Server(short=1))}, "--concurrency", "2"))
    assert result["loads"][0]["results"]["a"]["wrong_length"] == 12


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (Server(fails_at=2), "in the stream: worker lost"),
        (Server(ends=False), "the stream ended without [DONE]"),
        (Server(refuses=("model",)), "HTTP 400: unknown field model"),
    ],
)
async def test_a_server_that_fails_is_refused(start: Start, server: Server, expected: str):
    with pytest.raises(SystemExit) as caught:
        await measure(options({"a": await start(server)}))
    assert expected in str(caught.value)


async def test_no_server():
    with pytest.raises(SystemExit, match="lists no models"):
        await measure(options({"a": "http://127.0.0.1:1"}))


async def test_open_load_keeps_its_rate():
    sent: list[float] = []
    loop = asyncio.get_running_loop()

    async def send(number: int) -> Record:
        sent.append(loop.time())
        return Record(wanted_tokens=1)

    run = await drive(Load(rate=200.0), send, num_requests=50, seed=1)
    draw = random.Random(1)
    expected = sum(draw.expovariate(200.0) for _ in range(49))
    assert len(run.records) == 50
    assert sent[-1] - sent[0] == pytest.approx(expected, abs=0.15)


async def test_open_load_with_a_bound():
    running = most = 0

    async def send(number: int) -> Record:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return Record(wanted_tokens=1)

    await drive(Load(rate=10_000.0, concurrency=3), send, num_requests=20, seed=0)
    assert most == 3


class TestPrompts:
    def test_exact_length_with_a_tokenizer(self):
        tokenizer = Words()
        as_ids = PromptSource(length=17, seed=0, tokenizer=tokenizer, as_ids=True)
        as_text = PromptSource(length=17, seed=0, tokenizer=tokenizer, as_ids=False)
        ids, text = as_ids.next(), as_text.next()
        assert isinstance(ids, list)
        assert isinstance(text, str)
        assert len(ids) == 17
        assert tokenizer.encode(text) == ids

    def test_seed_and_variety(self):
        first, second = (PromptSource(length=30, seed=7, tokenizer=None, as_ids=False) for _ in range(2))
        prompts = [first.next() for _ in range(5)]
        assert prompts == [second.next() for _ in range(5)]
        assert len({str(prompt).split()[0] for prompt in prompts}) == 5

    def test_ids_need_a_tokenizer(self):
        with pytest.raises(ValueError, match="need a tokenizer"):
            PromptSource(length=3, seed=0, tokenizer=None, as_ids=True)


class TestSummary:
    def test_distribution(self):
        assert distribution([]) is None
        assert distribution([4.0, 1.0, 3.0, 2.0]) == {"mean": 2.5, "p50": 2.5, "p90": 3.7, "p99": 3.97}

    def test_times_of_one_record(self):
        record = Record(wanted_tokens=5, ttft_s=0.1, end_s=0.3, gaps_s=[0.06, 0.14], output_tokens=5)
        assert record.tpot_s == pytest.approx(0.05)  # four tokens after the first, in two events
        assert Record(wanted_tokens=1, ttft_s=0.1, output_tokens=1).tpot_s is None

    def test_failed_requests_do_not_count_as_throughput(self):
        from serving.load import Run

        good = Record(
            wanted_tokens=2, ttft_s=0.1, end_s=0.2, gaps_s=[0.1], output_tokens=2, counted_by_server=True
        )
        bad = Record(wanted_tokens=2, error="HTTP 500: x", output_tokens=1)
        result = summarise([Run([good, bad], 2.0, 0.1), Run([good], 2.0, 0.1)])
        assert result["errors"] == {"HTTP 500: x": 1}
        assert (result["requests_per_s"], result["output_tokens_per_s"]) == (0.5, 1.0)
        assert result["output_tokens_per_s_rounds"] == [1.0, 1.0]
        assert ratios(result, result)["ttft_ms_p50"] == 1.0
        assert "concurrency 8" in table("concurrency 8", {"a": result})

    def test_nothing_succeeded(self):
        from serving.load import Run

        result = summarise([Run([Record(wanted_tokens=2, error="e")], 1.0, 0.0)])
        assert result["ttft_ms"] is None
        assert "-" in table("x", {"a": result})
        assert ratios(result, result) == {}


class TestArguments:
    def test_target(self):
        target = parse_target("a=http://h:1/,m")
        assert (target.name, target.url, target.model) == ("a", "http://h:1", "m")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--target", "a"],
            ["--target", "a=h:1"],
            ["--target", "a=http://h", "--target", "a=http://i"],
            ["--target", "a=http://h", "--prompts", "ids"],
            ["--target", "a=http://h", "--concurrency", "0"],
            [],
        ],
    )
    def test_refusals(self, arguments: list[str], capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit) as caught:
            parse_arguments(arguments)
        assert caught.value.code == 2
        assert "error: " in capsys.readouterr().err


def test_as_a_program_writes_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import serve

    async def fake(options: argparse.Namespace) -> dict[str, Any]:
        return {"loads": [{"results": {"a": {"errors": {"e": 1}}}}]}

    monkeypatch.setattr(serve, "measure", fake)
    output = tmp_path / "result.json"
    assert serve.main(["--target", "a=http://h", "--output", str(output)]) == 1
    assert json.loads(output.read_text())["loads"]
