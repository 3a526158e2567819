"""One context and one generation worker on two GPUs beside one aggregated worker on a third, as clients see them.

    python benchmarks/gpu_disagg.py [--shape 8b] [--concurrency 8,16,32,64] [--output FILE.json]

Starts the three workers on random weights and a router, and runs serve.py against both. Two aggregated workers that
share a load evenly do what one does with half of it: compare a row of `disaggregated` with the row of `aggregated` at
the same concurrency (one worker, the same load) and at half of it (two workers, as many GPUs).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from gpu.dummy_model import SHAPES, write_model
from router_bench.processes import Process, free_port

_START_S = 300.0
_ROLES = ("aggregated", "context", "generation")  # one GPU each


class Servers:
    def __init__(self, stack: ExitStack, folder: Path, options: argparse.Namespace) -> None:
        self._stack = stack
        self._folder = folder
        self._device = options.device
        self.model = write_model(folder / options.shape, options.shape)
        self.urls: dict[str, str] = {}
        with ThreadPoolExecutor(len(_ROLES)) as pool:  # they load side by side
            list(pool.map(self._worker, _ROLES))
        self._router()

    def _worker(self, name: str) -> None:
        settings = {"device": self._device, "load_format": "dummy", "max_batch_size": 256}
        environment = {}
        if self._device == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[_ROLES.index(name)]
        role = [] if name == "aggregated" else ["--server_role", name.upper()]
        arguments = ["serve", str(self.model), "--config", self._write(name, settings), *role]
        port = free_port()
        self._start(name, [*arguments, "--host", "127.0.0.1", "--port", str(port)], port, environment)

    def _router(self) -> None:
        port = free_port()
        settings: dict[str, Any] = {"hostname": "127.0.0.1", "port": port}
        for role in ("context", "generation"):
            settings[f"{role}_servers"] = {"urls": [self.urls[role].removeprefix("http://")]}
        self._start(
            "disaggregated", ["disaggregated", "-c", self._write("router", settings)], port, environment={}
        )

    def _write(self, name: str, settings: dict[str, Any]) -> str:
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    def _start(self, name: str, arguments: list[str], port: int, environment: dict[str, str]) -> None:
        process = Process(
            [sys.executable, "-m", "diptych.cli", *arguments],
            port=port,
            log=self._folder / f"{name}.log",
            environment={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
            start_s=_START_S,
        )
        self._stack.enter_context(process)
        self.urls[name] = f"http://127.0.0.1:{port}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="[cuda]")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--concurrency", default="8,16,32,64")
    parser.add_argument("--input-len", default="1024")
    parser.add_argument("--output-len", default="128")
    parser.add_argument("--rounds", default="2")
    parser.add_argument("--output", type=Path, help="JSON file, as serve.py writes it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-disagg-") as folder, ExitStack() as stack:
        try:
            servers = Servers(stack, Path(folder), options)
            command = [sys.executable, str(Path(__file__).with_name("serve.py"))]
            for name in ("aggregated", "disaggregated"):
                command += ["--target", f"{name}={servers.urls[name]},{servers.model.name}"]
            for name in ("concurrency", "input-len", "output-len", "rounds"):
                command += [f"--{name}", getattr(options, name.replace("-", "_"))]
            command += ["--tokenizer", str(servers.model), "--prompts", "ids"]
            command += ["--output", str(options.output)] if options.output else []
            subprocess.run(command, check=True)
        except BaseException:
            for log in sorted(Path(folder).glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
