"""What a router costs: CPU time of a request and of a streamed event, throughput, added latency; peers in one run.

    python benchmarks/router.py [--peers VENV] [--rounds 3] [--only NAME,...] [--scenario NAME,...]

Each router stands between the load client and two mock workers (C programs of router_bench/), one for context
and one for generation, on the loopback. CPU time is that of the router's whole process tree. All routers are up at
once and take turns of two seconds, scenario by scenario: what else the machine does slows all of them down alike,
and only figures of the same minute are compared. --peers: a virtual environment with sglang-router==0.3.2 and
vllm-router==0.1.17.
"""

import argparse
import dataclasses
import itertools
import json
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from router_bench.processes import Process, build, free_port
from router_bench.scenarios import SCENARIOS, Scenario
from router_bench.systems import Ports, System, systems
from serving import machine

HERE = Path(__file__).parent
COLUMNS = (
    ("cpu_us_per_request", "CPU us a request"),
    ("cpu_us_per_event", "CPU us an event"),
    ("requests_per_s", "requests/s"),
    ("events_per_s", "events/s"),
    ("latency_p50_us", "latency p50 us"),
    ("latency_p99_us", "latency p99 us"),
    ("first_event_p50_us", "first event p50 us"),
    ("delay_p50_us", "event delay p50 us"),
    ("delay_p99_us", "event delay p99 us"),
)
Rows = list[dict[str, Any]]


class Bench:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        sources = HERE / "router_bench"
        self._mock = build(sources / "mock_worker.c", folder)
        self._client = build(sources / "load_client.c", folder)

    def measure(
        self, systems: list[System], scenarios: list[Scenario], num_rounds: int
    ) -> Iterator[dict[str, Any]]:
        """Workers and routers are new for each speed of tokens, as that is the worker's."""
        for tick_us, group in itertools.groupby(scenarios, key=lambda scenario: scenario.tick_us):
            with ExitStack() as stack:
                started = [(system, *self._start(system, tick_us, stack)) for system in systems]
                turns = itertools.product(list(group), range(num_rounds), started)
                for scenario, round_, (system, router, ports) in turns:
                    if round_ == 0:
                        warm_up = dataclasses.replace(scenario, seconds=0.3)
                        self._load(warm_up, ports.generation if router is None else ports.router)
                    yield {"system": system.name, "round": round_, **self._run(scenario, router, ports)}

    def _start(self, system: System, tick_us: int, stack: ExitStack) -> tuple[Process | None, Ports]:
        """The router with workers of its own; `direct` is none."""
        ports = Ports(*(free_port() for _ in range(4)))
        for port, role in ((ports.context, "prefill"), (ports.generation, "decode")):
            command = [str(self._mock), str(port), str(tick_us if role == "decode" else 0), role]
            stack.enter_context(self._process(command, port, role))
        router = system.command(ports, self._folder)
        if router is None:
            return None, ports
        return stack.enter_context(self._process(router, ports.router, system.kind)), ports

    def _run(self, scenario: Scenario, router: Process | None, ports: Ports) -> dict[str, Any]:
        port = ports.generation if router is None else ports.router
        before_s = router.cpu_s() if router else 0.0
        row = self._load(scenario, port)
        cpu_us = (router.cpu_s() - before_s) * 1e6 if router else 0.0
        row["cpu_us_per_request"] = cpu_us / row["all_requests"] if row["all_requests"] else None
        row["cpu_us_per_event"] = cpu_us / row["all_events"] if row["all_events"] else None
        row["memory_mb"] = router.memory_mb() if router else None
        return {"scenario": scenario.name, **row}

    def _load(self, scenario: Scenario, port: int) -> dict[str, Any]:
        command = [str(self._client), *scenario.arguments(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        row: dict[str, Any] = json.loads(done.stdout)
        return row

    def _process(self, command: list[str], port: int, name: str) -> Process:
        return Process(command, port=port, log=self._folder / f"{name}.log", environment={})


def summarise(rows: Rows) -> dict[str, dict[str, Any]]:
    """scenario -> system -> medians over the rounds, CPU time also as its least."""
    summary: dict[str, dict[str, Any]] = {}
    for scenario, system in dict.fromkeys((row["scenario"], row["system"]) for row in rows):
        runs = [row for row in rows if (row["scenario"], row["system"]) == (scenario, system)]
        entry: dict[str, Any] = {}
        for name, _ in COLUMNS:
            values = [row[name] for row in runs if row[name] is not None]
            if values and any(values):
                entry[name] = round(statistics.median(values), 1)
                if name.startswith("cpu"):
                    entry[f"{name}_min"] = round(min(values), 1)
        entry["memory_mb"] = max((row["memory_mb"] or 0.0 for row in runs), default=0.0)
        entry["requests"], entry["events"] = (
            sum(row[name] for row in runs) for name in ("requests", "events")
        )
        entry["errors"] = sum(row["errors"] + row["refused"] for row in runs)
        summary.setdefault(scenario, {})[system] = entry
    _add_latency(summary)
    return summary


def _add_latency(summary: dict[str, dict[str, Any]]) -> None:
    """`added_...`: over the latency of the worker alone, in the same rounds."""
    for entries in summary.values():
        direct = entries.get("direct", {})
        for name, entry in entries.items():
            for column in ("latency_p50_us", "latency_p99_us", "delay_p50_us", "delay_p99_us"):
                if name != "direct" and column in entry and column in direct:
                    entry[f"added_{column}"] = round(entry[column] - direct[column], 1)


def ratios(rows: Rows, ours: str) -> dict[str, dict[str, float]]:
    """scenario -> Rust router -> our CPU time over its, the median of the rounds: below 1 is better."""
    found: dict[str, dict[str, float]] = {}
    runs = {(row["scenario"], row["system"], row["round"]): row for row in rows}
    for scenario, rival in dict.fromkeys((row["scenario"], row["system"]) for row in rows):
        unit = "cpu_us_per_event" if scenario.startswith("stream") else "cpu_us_per_request"
        pairs = [
            (runs[scenario, ours, round_][unit], row[unit])
            for (of, system, round_), row in runs.items()
            if (of, system) == (scenario, rival) and (scenario, ours, round_) in runs
        ]
        quotients = [mine / theirs for mine, theirs in pairs if mine and theirs]
        if rival.endswith("-router") and quotients:
            found.setdefault(scenario, {})[rival] = round(statistics.median(quotients), 2)
    return found


def table(summary: dict[str, dict[str, Any]]) -> str:
    lines = []
    for scenario, entries in summary.items():
        lines.append(f"\n{scenario}")
        for system, entry in entries.items():
            shown = [f"{entry[name]:9.0f} {title}" for name, title in COLUMNS if name in entry]
            shown += [f"{entry['errors']} errors"] if entry["errors"] else []
            shown += [] if entry["requests"] or entry["events"] else [" nothing was answered"]
            lines.append(f"  {system:22s}" + " |".join(shown))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, metavar="VENV")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="NAME[,NAME...]", help="systems, by part of their name")
    parser.add_argument(
        "--scenario", default="", metavar="NAME[,NAME...]", help="scenarios, by part of their name"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "router.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no router is left behind
    chosen = [s for s in systems(options.peers) if any(part in s.name for part in options.only.split(","))]
    scenarios = [s for s in SCENARIOS if any(part in s.name for part in options.scenario.split(","))]
    report = {"benchmark": "router", "machine": machine.describe(), "rounds": options.rounds}
    report["versions"] = {system.name: system.version() for system in chosen}
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for row in bench.measure(chosen, scenarios, options.rounds):
            rows.append(row)
            cpu = row["cpu_us_per_event"] or row["cpu_us_per_request"] or 0.0
            print(f"{row['round']} {row['system']:22s} {row['scenario']:14s} {cpu:8.1f} us", flush=True)
    summary = summarise(rows)
    print(table(summary))
    report |= {"summary": summary, "runs": rows}
    report["cpu_ratio"] = {name: ratios(rows, name) for name in ("diptych", "diptych both at once")}
    print("\nour CPU time over the Rust routers':", json.dumps(report["cpu_ratio"], indent=1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
