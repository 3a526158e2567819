"""A pool for the doctors of other hosts to measure the way to: GET /kv/peer describes it, as on a worker."""

from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from diptych.errors import DiptychError, StartupError
from diptych.transceiver import packages
from diptych.transceiver.doctor.ends import open_owner
from diptych.transceiver.doctor.gpus import has_driver
from diptych.transceiver.ticket import encode_rank
from diptych.trust import ClusterTrust

PATH = "/kv/peer"


def serve(host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens, whose `serve_forever` is still to be called. Its pool lives as long as the process."""
    try:
        server = ThreadingHTTPServer((host, port), BaseHTTPRequestHandler)  # now: what follows takes a while
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    device = "cuda" if has_driver() else "cpu"
    names = (
        "cuda_ipc" if device == "cuda" else "shm",
        "tcp",
        *(name for name in packages.OPTIONAL if packages.missing_package(name) is None),
    )
    trust, description = ClusterTrust(None), encode_rank(open_owner(names, device, host).describe())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*_response(self.path, dict(self.headers), trust, description))

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: the doctor's terminal is for its findings."""

    server.RequestHandlerClass = Handler
    return server


def _response(
    path: str, headers: Mapping[str, str], trust: ClusterTrust, description: bytes
) -> tuple[int, bytes]:
    try:
        trust.check_secret(headers)
    except DiptychError as error:
        return error.status, error.message.encode()
    return (200, description) if path == PATH else (404, b"")
