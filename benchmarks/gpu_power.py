"""What kernels draw while they run for long: a GPU at its power limit lowers its clock, and everything slows down.

    python benchmarks/gpu_power.py [--seconds 1] [--output FILE.json]

The shape is that of Llama 3 8B. Power and clock are what nvidia-smi says every 50 ms; like the time of a call they are
means over the last two thirds of a case. `of_copy`: bytes read over what the memory gives in a copy, read and written.
"""

import argparse
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import DEVICE, WEIGHTS, DecodeCase, DecodeInputs, captured, gate_apart

from diptych.kernels.decode_attention_triton import DecodePlan
from diptych.kernels.gated_linear_triton import gated_linear
from diptych.kernels.gpu import num_multiprocessors

_PLANS = (DecodePlan(1), DecodePlan(1, stages=3), DecodePlan(1, tile=16), DecodePlan(1, num_warps=2))
_BATCH = 4  # runs between two looks at the clock


class Smi:
    """Samples of nvidia-smi, with the time at which they came."""

    def __init__(self) -> None:
        command = (
            "nvidia-smi --query-gpu=power.draw.instant,clocks.sm --format=csv,noheader,nounits -lms 50 -i 0"
        )
        self._process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, text=True)
        self._samples: list[tuple[float, float, float]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            watts, mhz = line.split(",")
            self._samples.append((time.monotonic(), float(watts), float(mhz)))

    def between(self, start: float, end: float) -> tuple[float, float]:
        """Watts and MHz; not a number where there were no samples."""
        found = [sample for sample in self._samples if start <= sample[0] <= end]
        if not found:
            return float("nan"), float("nan")
        return statistics.mean(watts for _, watts, _ in found), statistics.mean(mhz for _, _, mhz in found)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


def sustain(run: Callable[[], object], num_calls: int, smi: Smi, seconds: float) -> dict[str, float]:
    """Microseconds of one of the calls that `run` makes, watts and MHz, of runs one after the other for so long."""
    began = time.monotonic()
    times: list[float] = []
    while time.monotonic() < began + seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_BATCH):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / _BATCH / num_calls)
    watts, mhz = smi.between(began + seconds / 3, time.monotonic())
    return {"us": statistics.mean(times[len(times) // 3 :]), "watts": watts, "mhz": mhz}


def products(rows: int) -> list[Callable[[], object]]:
    """Of the layers' weights, with a gate apart: a call is all of one layer."""

    def layer() -> Callable[[], object]:
        shapes = {
            name: shape for name, shape in WEIGHTS.items() if name.startswith("8b") and name != "8b head"
        }
        weights = {name: torch.randn(shape, device=DEVICE).bfloat16() for name, shape in shapes.items()}
        inputs = {
            name: torch.randn(rows, weight.shape[1], device=DEVICE).bfloat16()
            for name, weight in weights.items()
        }

        def run() -> None:
            for name, weight in weights.items():
                product = gate_apart if name == "8b gate_up" else F.linear
                product(inputs[name], weight)

        return run

    return [layer() for _ in range(4)]


def measure(smi: Smi, seconds: float) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []

    def report(name: str, run: Callable[[], object], num_calls: int) -> float:
        found = sustain(run, num_calls, smi, seconds)
        cases.append({"case": name, **found})
        shown = " ".join(f"{key}={value:.1f}" for key, value in found.items())
        print(f"{name}: {shown}", flush=True)
        return found["us"]

    def report_graph(name: str, calls: list[Callable[[], object]]) -> float:
        return report(name, captured(calls).replay, len(calls))

    source = torch.empty(1 << 30, dtype=torch.int32, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)  # not in a graph: that gave 2.7 TB/s instead of 4.3
    copy_rate = 2 * source.nbytes / report("copy", copy, 1)
    del copy, source, target
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        case = DecodeCase(32, 8, 128, 256, 1088, dtype)
        inputs = DecodeInputs(case)
        for plan in _PLANS:
            us = report_graph(f"attention of 256 x 1088, {dtype}, {plan}", inputs.calls(plan))
            cases[-1]["of_copy"] = case.num_bytes / us / copy_rate
        del inputs
        torch.cuda.empty_cache()
    report_graph("products of a layer, 256 rows", products(256))
    x = torch.randn(8192, 4096, device=DEVICE).bfloat16()
    weights = [torch.randn(WEIGHTS["8b gate_up"], device=DEVICE).bfloat16() for _ in range(2)]
    report_graph(
        "gate and up of 8192 rows, gate apart", [partial(gate_apart, x, weight) for weight in weights]
    )
    sms = num_multiprocessors(DEVICE)
    report_graph(
        "gate and up of 8192 rows, gated", [partial(gated_linear, x, weight, sms) for weight in weights]
    )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with closing(Smi()) as smi:
        cases = measure(smi, arguments.seconds)
    if arguments.output is not None:
        found = {
            "device": torch.cuda.get_device_name(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {"torch": torch.__version__, "triton": version("triton")},
            "cases": cases,
        }
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
