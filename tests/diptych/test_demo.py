"""The demo's line of figures, from what servers report and from what they leave out."""

from collections.abc import Mapping

from aiohttp import web

from diptych.demo import Answer, _show_answer, figures, server_timing


def answer(stages_ms: Mapping[str, float] | None = None) -> Answer:
    return Answer(
        request_id="r",
        ttft_s=0.0419,
        decode_s=1.0,
        num_prompt_tokens=40,
        num_tokens=51,
        stages_ms=stages_ms or {},
    )


def test_server_timing():
    header = "router_queue;dur=0.30, prefill;dur=25.787, decode;dur=0.2, decode;dur=0.4"
    assert server_timing(header) == {"router_queue": 0.3, "prefill": 25.787, "decode": 0.4}
    assert server_timing("") == {}


def test_all_figures():
    transfer = {"wire_bytes": 1_470_000, "wire_s": 0.0005, "transport": "shm", "first_token_s": 0.0189}
    assert figures(answer({"prefill": 31.52}), transfer) == (
        "prefill 31.5 ms (40 tokens) | KV 1.47 MB over shm, 2.9 GB/s | handover 18.9 ms | TTFT 41.9 ms | "
        "50.0 tokens/s"
    )


def test_figures_that_nobody_reported_are_left_out():
    assert figures(answer(), {}) == "TTFT 41.9 ms | 50.0 tokens/s"
    assert "KV 2.00 MB over shm |" in figures(answer(), {"wire_bytes": 2_000_000, "transport": "shm"})


async def test_asks_and_shows(aiohttp_server, capsys):
    async def chat(request: web.Request) -> web.StreamResponse:
        headers = {"Server-Timing": "prefill;dur=5.0", "X-Request-ID": "abc"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for text in ("", "Because", " of air"):
            await response.write(b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % text.encode())
        await response.write(
            b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\n'
        )
        await response.write(b"data: [DONE]\n\n")
        return response

    async def perf(request: web.Request) -> web.Response:
        assert request.query["request_id"] == "abc"
        return web.json_response([{"request_id": "abc", "first_token_s": 0.002}])

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/perf_metrics", perf)])
    url = await aiohttp_server(app)
    await _show_answer(url, {"gen0": url}, "Why?")
    shown = capsys.readouterr().out
    assert "> Why?\n\nBecause of air\n" in shown
    assert "prefill 5.0 ms (7 tokens) | handover 2.0 ms | TTFT" in shown
