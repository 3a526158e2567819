"""A stand-in for `trtllm-serve` that the launcher can start: answers /health, does as its environment says.

FAKE_DIR: a folder where each process writes NAME.pid and NAME.args; NAME is its role, or "router".
FAKE_DIE: NAME of one that fails at its start.
FAKE_STUBBORN: NAME of one that ignores SIGTERM and has a child.
FAKE_NEVER_READY: NAME of one whose health is never good.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from diptych.launcher.parent import die_with_parent


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def main() -> None:
    die_with_parent(int(os.environ["DIPTYCH_PARENT_PID"]))
    name = "router" if sys.argv[1] == "disaggregated" else option("--server_role").lower()
    folder = Path(os.environ["FAKE_DIR"])
    settings = Path(option("-c" if name == "router" else "--config")).read_text()
    (folder / f"{name}.args").write_text(json.dumps([sys.argv[1:], settings]))
    print(f"{name} starts")
    print("10 %\r20 %\rloaded", file=sys.stderr)
    if os.environ.get("FAKE_DIE") == name:
        print("error: no such model")
        raise SystemExit(3)
    if os.environ.get("FAKE_STUBBORN") == name:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "grandchild.pid").write_text(str(child.pid))
    ready = os.environ.get("FAKE_NEVER_READY") != name

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if ready else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(option("--listen_fd")))
    (folder / f"{name}.pid").write_text(str(os.getpid()))
    server.serve_forever()
    time.sleep(600)


if __name__ == "__main__":
    main()
