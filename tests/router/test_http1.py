"""Reading responses: every split of the bytes gives the same body, and nonsense is refused."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.router.http1 import ChunkedBody, CloseBody, Head, LengthBody, MalformedResponse, build_request


def chunked(chunks: list[bytes], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    framed = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    return framed + b"0\r\n" + trailer + b"\r\n"


def feed_in_pieces(body, data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [body.feed(data[a:b]) for a, b in pairwise(bounds)]


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=8),
    st.lists(st.integers(0, 10_000), max_size=12),
    st.sampled_from([b"", b";name=value"]),
    st.sampled_from([b"", b"X-Trailer: 1\r\n"]),
)
def test_chunked_body_is_the_same_however_it_is_split(chunks, cuts, extension, trailer):
    data = chunked(chunks, extension=extension, trailer=trailer)
    body = ChunkedBody()
    assert b"".join(feed_in_pieces(body, data, cuts)) == b"".join(chunks)
    assert body.done
    assert not body.excess


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.integers(0, 10_000))
def test_a_broken_chunked_body_gives_whole_chunks_only(chunks, cut):
    data = chunked(chunks)
    body = ChunkedBody()
    payload = body.feed(data[: cut % len(data)])
    assert not body.done
    wholes = [b"".join(chunks[:n]) for n in range(len(chunks) + 1)]
    assert payload in wholes


def test_large_chunk_in_small_reads():
    chunk = bytes(range(256)) * 4096
    data = chunked([chunk])
    body = ChunkedBody()
    parts = [body.feed(data[i : i + 1000]) for i in range(0, len(data), 1000)]
    assert b"".join(parts) == chunk
    assert [part for part in parts if part] == [chunk]


@pytest.mark.parametrize(
    "data",
    [
        *(
            size + b"\r\nabcdefghijklmnop\r\n"
            for size in (b"zz", b"-5", b"-0", b"+10", b"0x10", b"1_0", b" 10", b"")
        ),
        b"2\r\nabcd\r\n",
        b"1" * 2000,
    ],
)
def test_malformed_chunks_are_refused(data):
    with pytest.raises(MalformedResponse):
        ChunkedBody().feed(data)


def test_bytes_after_the_end_are_noticed():
    chunks = ChunkedBody()
    chunks.feed(chunked([b"a"]) + b"HTTP/1.1")
    assert chunks.done
    assert chunks.excess
    length = LengthBody(3)
    assert length.feed(b"abcd") == b"abc"
    assert length.excess


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (b"Content-Length: 5", LengthBody),
        (b"transfer-encoding: Chunked", ChunkedBody),
        (b"Content-Type: text/plain", CloseBody),
    ],
)
def test_the_head_tells_the_kind_of_body(lines, kind):
    assert isinstance(Head(b"HTTP/1.1 200 OK\r\n" + lines).body(), kind)


def test_headers_are_found_in_any_case():
    head = Head(b"HTTP/1.1 429 Too Many\r\nRETRY-After:  7 \r\nContent-Type: a\r\nLast: Z")
    assert head.status == 429
    assert head.get("retry-after") == "7"
    assert head.get("last") == "Z"
    assert head.get("after") is None


@pytest.mark.parametrize(
    ("raw", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close", False),
        (b"HTTP/1.0 200 OK", False),
    ],
)
def test_keep_alive(raw, keep_alive):
    assert Head(raw).keep_alive is keep_alive


@pytest.mark.parametrize("raw", [b"SSH-2.0-x", b"HTTP/2 200", b"HTTP/1.1 abc", b""])
def test_other_protocols_are_refused(raw):
    with pytest.raises(MalformedResponse):
        Head(raw)


def test_a_bad_length_is_refused():
    with pytest.raises(MalformedResponse):
        Head(b"HTTP/1.1 200 OK\r\nContent-Length: -1").body()


def test_requests_with_and_without_a_body():
    assert build_request("GET", "/health", "h:1", b"", b"") == b"GET /health HTTP/1.1\r\nHost: h:1\r\n\r\n"
    assert build_request("POST", "/p", "[::1]:8", b"X-A: 1\r\n", b"{}") == (
        b"POST /p HTTP/1.1\r\nHost: [::1]:8\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
        b"X-A: 1\r\n\r\n{}"
    )
