"""The routers that are compared: how each one is started in front of one context and one generation worker.

`direct` is no router: the client talks to the generation worker, which is what the others' latency is counted
from.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ports:
    router: int
    context: int
    generation: int
    metrics: int


@dataclass(frozen=True, slots=True)
class System:
    name: str
    kind: str  # direct, diptych, sglang or vllm
    num_processes: int = 1
    schedule_style: str = (
        "context_first"  # of ours; sglang-router sends both legs at once, vllm-router in turn
    )
    environment: Path | None = None  # the virtual environment that it is installed in

    def command(self, ports: Ports, folder: Path) -> list[str] | None:
        context, generation = (f"http://127.0.0.1:{port}" for port in (ports.context, ports.generation))
        face = ["--host", "127.0.0.1", "--port", str(ports.router), "--policy", "round_robin"]
        metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports.metrics)]
        if self.kind == "diptych":
            config = folder / f"router-{ports.router}.json"
            config.write_text(json.dumps(self._configuration(ports)))
            return [sys.executable, "-m", "diptych.cli", "disaggregated", "-c", str(config)]
        if self.kind == "sglang":
            return [
                *(self._program("sglang-router"), "launch", *face, *metrics, "--log-level", "warn"),
                *("--pd-disaggregation", "--prefill", context, "none", "--decode", generation),
            ]
        if self.kind == "vllm":
            return [
                *(self._program("vllm-router"), *face, *metrics, "--log-level", "warning"),
                *("--vllm-pd-disaggregation", "--prefill", context, "--decode", generation),
                *("--kv-connector", "nixl"),
            ]
        return None

    def version(self) -> str:
        package = {"sglang": "sglang-router", "vllm": "vllm-router"}.get(self.kind, "diptych")
        python = sys.executable if self.environment is None else str(self.environment / "bin" / "python")
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    def _program(self, name: str) -> str:
        assert self.environment is not None
        return str(self.environment / "bin" / name)

    def _configuration(self, ports: Ports) -> dict[str, object]:
        return {
            "hostname": "127.0.0.1",
            "port": ports.router,
            "num_workers": self.num_processes,
            "log_level": "warning",
            "schedule_style": self.schedule_style,
            "context_servers": {"urls": [f"127.0.0.1:{ports.context}"]},
            "generation_servers": {"urls": [f"127.0.0.1:{ports.generation}"]},
        }


def systems(environment: Path | None) -> list[System]:
    """All of them; the Rust routers when there is an environment that has them."""
    found = [
        System("direct", "direct"),
        System("diptych", "diptych"),
        System("diptych both at once", "diptych", schedule_style="generation_first"),
        System("diptych x2", "diptych", num_processes=2),
    ]
    for kind in ("sglang", "vllm"):
        if environment is not None and (environment / "bin" / f"{kind}-router").exists():
            found.append(System(f"{kind}-router", kind, environment=environment))
    return found
