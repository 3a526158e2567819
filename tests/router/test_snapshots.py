"""Metrics of several processes as one."""

import os
import subprocess
import sys

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from diptych.router.metrics import Metrics
from diptych.router.snapshots import Merged, Snapshots
from diptych.router.tally import Tallies


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def process_of(folder, name: str, amount: int) -> tuple[CollectorRegistry, Snapshots]:
    registry = CollectorRegistry()
    tallies = Tallies()
    registry.register(tallies)
    tallies.count("things", "Counted.").inc(amount)
    tallies.spread("sizes", "Measured.", (1.0, 2.0)).observe(amount)
    labelled = Counter("kinds", "By kind.", ["kind"], registry=registry)
    labelled.labels(f"only-{amount}").inc()
    labelled.labels("all").inc(amount)
    Gauge("running", "Now.", registry=registry).set(amount)
    Gauge("worker_ready", "Alike.", ["worker"], registry=registry).labels("w").set(1)
    snapshots = Snapshots(folder, name)
    snapshots.write(registry)
    return registry, snapshots


def test_sums_keep_what_ended_processes_counted(tmp_path):
    process_of(tmp_path, f"1-{os.getppid()}", 3)
    process_of(tmp_path, f"2-{gone()}", 10)
    registry, snapshots = process_of(tmp_path, f"0-{os.getpid()}", 1)
    text = generate_latest(Merged(registry, snapshots)).decode().splitlines()
    for line in (
        "things_total 14.0",
        'sizes_bucket{le="1.0"} 1.0',
        'sizes_bucket{le="+Inf"} 3.0',
        "sizes_sum 14.0",
        'kinds_total{kind="all"} 14.0',
        'kinds_total{kind="only-10"} 1.0',
        "running 4.0",
        'worker_ready{worker="w"} 1.0',
    ):
        assert line in text


def test_tallies_look_as_prometheus_client_has_them():
    """The same numbers through the library's own counter and histogram print the same lines."""
    from prometheus_client import Histogram

    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies = Tallies()
    ours.register(tallies)
    count, spread = tallies.count("n", "N."), tallies.spread("s", "S.", (0.1, 1.0))
    counter = Counter("n", "N.", registry=theirs)
    histogram = Histogram("s", "S.", buckets=(0.1, 1.0), registry=theirs)
    for value in (0.05, 0.1, 0.5, 7.0):
        count.inc(value)
        counter.inc(value)
        spread.observe(value)
        histogram.observe(value)
    shown = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == shown


async def test_a_process_leaves_its_last_numbers_behind(tmp_path):
    name = f"0-{gone()}"
    async with Metrics(Snapshots(tmp_path, name)) as metrics:
        metrics.requests.inc(5)
    other = Metrics(Snapshots(tmp_path, f"1-{os.getpid()}"))
    other.requests.inc(2)
    assert "total_requests_total 7.0" in other.text().decode()
