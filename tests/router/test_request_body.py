"""What face.py's tests cannot show: there the operating system decides how a body is cut into reads."""

import pytest

from diptych.errors import PayloadTooLarge
from diptych.router.request_body import RequestBody
from diptych.router.request_head import RequestHead

CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked"


def test_whole_chunks_and_one_without_an_end_count_together():
    body = RequestBody(RequestHead(CHUNKED), 1000)
    body.feed(b"384\r\n" + b"x" * 900 + b"\r\n")
    body.feed(b"ffffffff\r\n")
    body.feed(b"x" * (64 * 1024))
    with pytest.raises(PayloadTooLarge):
        body.feed(b"x" * 100)


def test_one_byte_a_chunk_is_as_good_as_any():
    body = RequestBody(RequestHead(CHUNKED), 1000)
    for _ in range(1000):
        body.feed(b"1\r\nx\r\n")
    assert body.feed(b"0\r\n\r\n") == b""
    assert body.is_complete
    assert body.whole() == b"x" * 1000
