"""Heads of requests: what is read from them, and what is refused because two readers could differ on it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.router.request_head import BadRequest, RequestHead

LINE = b"POST /v1/completions HTTP/1.1"


def test_what_is_read():
    head = RequestHead(
        LINE + b"\r\nHost: x\r\nContent-Length:  12 \r\nX-Request-ID: A b\r\nx-REQUEST-id: second"
    )
    assert (head.method, head.path, head.minor, head.length) == (b"POST", "/v1/completions", 1, 12)
    assert head.keep_alive
    assert not head.is_chunked
    assert head.get("x-request-id") == "A b"
    assert head.get("Nothing") is None


def test_a_query_is_no_part_of_the_path():
    assert RequestHead(b"GET /health?x=/v1/completions HTTP/1.1").path == "/health"


def test_a_header_is_not_found_inside_of_another():
    head = RequestHead(LINE + b"\r\nX-Content-Length: 5\r\nNote: Content-Length: 7")
    assert head.length == 0


@pytest.mark.parametrize(
    ("line", "header", "keep_alive"),
    [
        (b"GET / HTTP/1.1", b"", True),
        (b"GET / HTTP/1.1", b"\r\nConnection: Close", False),
        (b"GET / HTTP/1.0", b"", False),
        (b"GET / HTTP/1.0", b"\r\nConnection: Keep-Alive", True),
    ],
)
def test_keep_alive(line, header, keep_alive):
    assert RequestHead(line + header).keep_alive is keep_alive


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"POST /v1/completions",
        b"POST  /v1/completions HTTP/1.1",
        b"POST /v1/completions HTTP/2.0",
        b"POST /v1/comple\xfftions HTTP/1.1",
        LINE + b"\r\nno colon",
        LINE + b"\r\nName : value",
        LINE + b"\r\n folded: value",
        LINE + b"\r\nA: b\r\n folded",
        LINE + b"\r\nA: b\nContent-Length: 3",
        LINE + b"\r\nA: b\rContent-Length: 3",
        LINE + b"\r\nA: nul\x00",
        LINE + b"\r\nContent-Length: 3\r\nContent-Length: 3",
        LINE + b"\r\nContent-Length: +3",
        LINE + b"\r\nContent-Length: 3, 3",
        LINE + b"\r\nContent-Length: 0x3",
        LINE + b"\r\nContent-Length:",
        LINE + b"\r\nContent-Length: 3\r\nTransfer-Encoding: chunked",
        LINE + b"\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        LINE + b"\r\nTransfer-Encoding: gzip, chunked",
        LINE + b"\r\nTransfer-Encoding: \x0bchunked",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked",
    ],
)
def test_refused(raw):
    with pytest.raises(BadRequest):
        RequestHead(raw)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused(noise):
    for raw in (noise, LINE + b"\r\nA: " + noise, LINE + b"\r\n" + noise):
        try:
            head = RequestHead(raw)
        except BadRequest:
            continue
        assert b"\n" not in raw.replace(b"\r\n", b"")
        assert head.length >= 0
