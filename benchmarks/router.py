"""What a router costs: CPU time of a request and of a streamed event, throughput, added latency; peers in one run.

    python benchmarks/router.py [--peers VENV] [--rounds 3] [--only NAME,...] [--scenario NAME,...]

Each router stands between the load client and two mock workers (C programs of router_bench/), one for context
and one for generation, on the loopback. CPU time is that of the router's whole process tree. The routers take
turns within each round. --peers: a virtual environment with sglang-router==0.3.2 and vllm-router==0.1.17.
"""

import argparse
import itertools
import json
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

    def measure(self, system: System, scenarios: list[Scenario]) -> Iterator[dict[str, Any]]:
        """Workers and router are new for each speed of tokens, as that is the worker's."""
        for tick_us, group in itertools.groupby(scenarios, key=lambda scenario: scenario.tick_us):
            with ExitStack() as stack:
                ports = Ports(*(free_port() for _ in range(4)))
                for port, role in ((ports.context, "prefill"), (ports.generation, "decode")):
                    command = [str(self._mock), str(port), str(tick_us if role == "decode" else 0), role]
                    stack.enter_context(self._process(command, port, role))
                command_ = system.command(ports, self._folder)
                router = None
                if command_ is not None:
                    router = stack.enter_context(self._process(command_, ports.router, system.kind))
                for scenario in group:
                    yield self._run(scenario, router, ports)

    def _run(self, scenario: Scenario, router: Process | None, ports: Ports) -> dict[str, Any]:
        port = ports.generation if router is None else ports.router
        self._load(Scenario("", scenario.mode, scenario.concurrency, 0.3, scenario.max_tokens), port)
        before_s = router.cpu_s() if router else 0.0
        row = self._load(scenario, port)
        cpu_s = (router.cpu_s() - before_s if router else 0.0) * row["seconds"] / (row["seconds"] + 0.5)
        row["cpu_us_per_request"] = cpu_s / row["requests"] * 1e6 if row["requests"] else None
        row["cpu_us_per_event"] = cpu_s / row["events"] * 1e6 if row["events"] else None
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


def ratios(summary: dict[str, dict[str, Any]], ours: str = "diptych") -> dict[str, dict[str, float]]:
    """Our CPU time against the better Rust router's, least against least: below 1 is better."""
    found: dict[str, dict[str, float]] = {}
    for scenario, entries in summary.items():
        unit = "cpu_us_per_event" if scenario.startswith("stream") else "cpu_us_per_request"
        for statistic in (unit, f"{unit}_min"):
            rivals = [
                entry[statistic]
                for name, entry in entries.items()
                if "-router" in name and statistic in entry
            ]
            mine = entries.get(ours, {}).get(statistic)
            if rivals and mine:
                found.setdefault(scenario, {})[statistic] = round(mine / min(rivals), 2)
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
    chosen = [s for s in systems(options.peers) if any(part in s.name for part in options.only.split(","))]
    scenarios = [s for s in SCENARIOS if any(part in s.name for part in options.scenario.split(","))]
    report = {"benchmark": "router", "machine": machine.describe(), "rounds": options.rounds}
    report["versions"] = {system.name: system.version() for system in chosen}
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for round_, system in itertools.product(range(options.rounds), chosen):
            for row in bench.measure(system, scenarios):
                rows.append({"system": system.name, "round": round_, **row})
                cpu = row["cpu_us_per_event"] or row["cpu_us_per_request"] or 0.0
                print(f"{round_} {system.name:22s} {row['scenario']:14s} {cpu:8.1f} us", flush=True)
    summary = summarise(rows)
    print(table(summary))
    print("\nour CPU time / the better Rust router's:", json.dumps(ratios(summary), indent=1))
    report |= {"summary": summary, "cpu_ratio_to_better_rust_router": ratios(summary), "runs": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
