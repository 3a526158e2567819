"""benchmarks/router.py: its arithmetic, and its two C programs against each other."""

import itertools
import shutil
from pathlib import Path

import pytest
from router_bench.scenarios import SCENARIOS, Scenario
from router_bench.systems import Ports, systems

from router import Bench, ratios, summarise, table

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def row(system: str, cpu: float, latency: float, *, round_: int = 0) -> dict:
    return {
        "round": round_,
        "system": system,
        "scenario": "json c64",
        "requests": 10,
        "errors": 0,
        "refused": 1,
        "events": 0,
        "requests_per_s": 1000,
        "events_per_s": 0,
        "latency_p50_us": latency,
        "latency_p99_us": latency * 2,
        "first_event_p50_us": latency,
        "delay_p50_us": None,
        "delay_p99_us": None,
        "cpu_us_per_request": cpu,
        "cpu_us_per_event": None,
        "memory_mb": 10.0,
    }


def test_summary_and_ratios():
    rows = [row("direct", 0.0, 100), row("diptych", 90.0, 400), row("diptych", 180.0, 600, round_=1)]
    rows += [row("a-router", 100.0, 500), row("a-router", 300.0, 500, round_=1), row("b-router", 200.0, 500)]
    summary = summarise(rows)
    ours = summary["json c64"]["diptych"]
    assert (ours["cpu_us_per_request"], ours["cpu_us_per_request_min"]) == (135.0, 90.0)
    assert ours["added_latency_p50_us"] == 400.0
    assert ours["errors"] == 2
    assert ratios(rows, "diptych") == {"json c64": {"a-router": 0.75, "b-router": 0.45}}
    assert ratios(rows, "another") == {}
    assert "diptych" in table(summary)


def test_scenarios_run_in_groups_of_one_worker_speed():
    """So that workers and router are started once for each speed."""
    speeds = [scenario.tick_us for scenario in SCENARIOS]
    assert len([1 for before, after in itertools.pairwise(speeds) if before != after]) + 1 == len(set(speeds))


def test_commands(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm-router").touch()
    ports = Ports(1, 2, 3, 4)
    commands = {system.name: system.command(ports, tmp_path) for system in systems(tmp_path)}
    assert set(commands) == {"direct", "diptych", "diptych both at once", "diptych x2", "vllm-router"}
    assert commands["direct"] is None
    assert "http://127.0.0.1:2" in commands["vllm-router"]


def test_a_short_run(tmp_path: Path):
    chosen = [system for system in systems(None) if system.num_processes == 1]
    scenarios = [
        Scenario("json", "json", 4, 0.2),
        Scenario("paced", "json", 4, 0.5, pause_us=20_000),
        Scenario("burst", "stream", 4, 0.2, max_tokens=8),
        Scenario("stream", "stream", 4, 0.5, max_tokens=8, tick_us=10_000),
    ]
    rows = list(Bench(tmp_path).measure(chosen, scenarios, 1))
    names = [scenario.name for scenario in scenarios]
    assert [row["scenario"] for row in rows] == [name for name in names for _ in chosen]
    assert all(row["requests"] > 0 and row["errors"] == row["refused"] == 0 for row in rows)
    assert all(row["events"] >= 8 * row["requests"] for row in rows if row["scenario"] == "burst")
