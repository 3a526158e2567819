"""One context and one generation worker on two GPUs beside one aggregated worker on a third, as clients see them.

    python benchmarks/gpu_disagg.py [--shape 8b] [--gpus 3] [--concurrency 16,32,64,128] [--output FILE.json]

Starts the three workers on random weights and a router, and runs serve.py against both. Two aggregated workers that
share a load evenly do what one does with half of it: compare a row of `disaggregated` with the row of `aggregated` at
the same concurrency (one worker, the same load) and at half of it (two workers, as many GPUs). Of two GPUs the
aggregated worker shares one with the generation worker: each is idle while the other is measured.
"""

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu.dummy_model import SHAPES, write_model
from serving.mesh import Mesh

_ROLES = {"aggregated": None, "context": "CONTEXT", "generation": "GENERATION"}

_KV_TOKENS = 200_000  # of each worker: two of them fit into one GPU


def start(mesh: Mesh, model: Path, device: str, gpus: int) -> None:
    settings: dict[str, Any] = {
        "device": device,
        "load_format": "dummy",
        "max_batch_size": 256,
        "kv_cache_config": {"max_tokens": _KV_TOKENS, "enable_block_reuse": False},  # prompts come again
    }
    if device == "cpu":
        settings["num_threads"] = 1

    def worker(number: int, name: str) -> None:
        gpu = number % gpus if device == "cuda" else None
        mesh.worker(name, str(model), _ROLES[name], settings, gpu=gpu)

    with ThreadPoolExecutor(len(_ROLES)) as pool:  # they load side by side
        list(pool.map(worker, range(len(_ROLES)), _ROLES))
    mesh.router("disaggregated")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="[cuda]")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--gpus", type=int, choices=(2, 3), default=3, help="[3]")
    parser.add_argument("--concurrency", default="16,32,64,128")
    parser.add_argument("--input-len", default="1024")
    parser.add_argument("--output-len", default="128")
    parser.add_argument(
        "--num-requests", default="384", help="at each concurrency: several for each client [384]"
    )
    parser.add_argument("--rounds", default="1")
    parser.add_argument("--output", type=Path, help="JSON file, as serve.py writes it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-disagg-") as folder, Mesh(Path(folder)) as mesh:
        model = write_model(Path(folder) / options.shape, options.shape)
        start(mesh, model, options.device, options.gpus)
        command = [sys.executable, str(Path(__file__).with_name("serve.py"))]
        for name in ("aggregated", "disaggregated"):
            command += ["--target", f"{name}={mesh.urls[name]},{model.name}"]
        for name in ("concurrency", "input-len", "output-len", "num-requests", "rounds"):
            command += [f"--{name}", getattr(options, name.replace("-", "_"))]
        command += ["--tokenizer", str(model), "--prompts", "ids"]
        command += ["--output", str(options.output)] if options.output else []
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
