"""The metrics of several processes as one: each writes what it has counted into a folder that they share.

Once a second, and at the end: what a process counted stays counted when it has gone, so that sums never fall.
Counters and histograms are summed over all; gauges over those that live, but for those in `_SAME`, which every
process sees alike. Whoever is asked adds its own numbers of this moment to the others' last ones.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

_SAME = frozenset(("worker_ready", "diptych_router_prefix_index_blocks"))


class Family(msgspec.Struct, array_like=True):
    name: str
    text: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


class Snapshots:
    def __init__(self, folder: Path, name: str) -> None:
        """`name`: this process's, SLOT-PID."""
        self._folder = folder
        self._name = name

    def write(self, registry: CollectorRegistry) -> None:
        path = self._folder / self._name
        unfinished = path.with_suffix(".new")
        unfinished.write_bytes(msgspec.msgpack.encode(_families(registry)))
        unfinished.replace(path)

    def merged(self, registry: CollectorRegistry) -> Iterator[Metric]:
        """This process's metrics of now, and the others'."""
        families = {family.name: family for family in _families(registry)}
        for path in sorted(self._folder.iterdir()):
            if path.name == self._name or path.suffix:
                continue
            lives = _lives(int(path.name.rpartition("-")[2]))
            for theirs in msgspec.msgpack.decode(path.read_bytes(), type=list[Family]):
                if theirs.kind != "gauge" or lives:
                    ours = families.setdefault(theirs.name, msgspec.structs.replace(theirs, samples=[]))
                    _add(ours, theirs)
        for family in families.values():
            metric = Metric(family.name, family.text, family.kind)
            for name, labels, value in family.samples:
                metric.add_sample(name, labels, value)
            yield metric


class Merged:
    """Looks like a registry to prometheus_client's `generate_latest`."""

    def __init__(self, registry: CollectorRegistry, snapshots: Snapshots) -> None:
        self._registry = registry
        self._snapshots = snapshots

    def collect(self) -> Iterable[Metric]:
        return self._snapshots.merged(self._registry)


def _families(registry: CollectorRegistry) -> list[Family]:
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [(s.name, s.labels, float(s.value)) for s in metric.samples if not s.name.endswith("_created")],
        )
        for metric in registry.collect()
    ]


def _add(ours: Family, theirs: Family) -> None:
    values = {(name, *sorted(labels.items())): (name, labels, value) for name, labels, value in ours.samples}
    for name, labels, value in theirs.samples:
        key = (name, *sorted(labels.items()))
        here = values[key][2] if key in values else 0.0
        values[key] = (name, labels, max(here, value) if ours.name in _SAME else here + value)
    ours.samples = list(values.values())


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
