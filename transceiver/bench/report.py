"""What kv-bench found: a table, a JSON file that says where and when, and a plot."""

import importlib.util
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from diptych import __version__
from diptych.errors import ConfigError
from diptych.transceiver.bench.run import Row

_PACKAGES = ("torch", "triton", "numpy", "msgspec", "xxhash", "nixl-cu13", "ucxx-cu13")


def table(rows: list[Row]) -> str:
    header = (
        f"{'transport':9s} {'case':26s} {'tokens':>7s} {'MiB':>6s} {'wire ms':>9s} {'total ms':>9s} "
        f"{'GB/s':>7s} {'plain':>7s} {'fraction':>8s} {'first ms':>9s} {'plain':>8s}"
    )
    lines = [
        f"{row.transport:9s} {row.case:26s} {row.tokens:7d} {row.bytes >> 20:6d} {row.wire_ms:9.3f} "
        f"{row.total_ms:9.3f} {row.wire_gb_s:7.1f} {row.plain_gb_s:7.1f} {row.fraction:8.3f} "
        f"{row.first_wire_ms:9.3f} {row.first_plain_ms:8.3f}"
        for row in rows
    ]
    return "\n".join([header, *lines])


def write_json(path: Path, rows: list[Row], shape: str, device: str, rounds: int) -> None:
    report = {
        "benchmark": "trtllm-serve kv-bench",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": shape,
        "rounds": rounds,
        "where": _where(device),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def require_plots() -> None:
    """Before minutes of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install diptych[plot]")


def plot(path: Path, rows: list[Row], shape: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.case == "scrambled":
            lines.setdefault(f"{row.transport}: the link's plain copy", []).append(
                (row.tokens, row.plain_gb_s)
            )
        if not row.case.endswith("programs"):
            lines.setdefault(f"{row.transport}: {row.case}", []).append((row.tokens, row.wire_gb_s))
    for label, points in lines.items():
        style = "--" if label.endswith("plain copy") else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="GB/s", title=f"KV transfer, {shape} model")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _where(device: str) -> dict[str, Any]:
    where: dict[str, Any] = {
        "device": _gpus() if device == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "diptych": __version__,
    }
    for package in _PACKAGES:
        try:
            where[package] = version(package)
        except PackageNotFoundError:
            where[package] = None
    return where


def _gpus() -> list[str]:
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return listed.stdout.strip().splitlines()


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return model or platform.processor()
