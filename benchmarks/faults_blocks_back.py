"""How soon held KV blocks are free again after a fault, over runs of the fault suite.

    DIPTYCH_BLOCKS_BACK=/tmp/back.jsonl pytest tests/end_to_end/faults      (as often as wanted)
    python benchmarks/faults_blocks_back.py /tmp/back.jsonl --passes 20 --load "20 passes at once, 2 cores each"

The suite notes each wait in which it found blocks still held; the time is from the end of the last request or fault
to the first look that found none, with the 0.1 s that a worker's metrics may be old, and 0.02 s between looks.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import orjson
from serving.machine import describe

RESULT = Path(__file__).parent / "results" / "faults_blocks_back.json"
WANTED_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notes", nargs="+", type=Path)
    parser.add_argument("--passes", type=int, required=True, help="of the suite, in these notes")
    parser.add_argument("--load", required=True, help="what else ran, in words")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    by_test = defaultdict[str, list[float]](list)
    for file in arguments.notes:
        for line in file.read_bytes().splitlines():
            note = orjson.loads(line)
            by_test[note["test"].partition(" (")[0]].append(note["seconds"])
    every = [seconds for times in by_test.values() for seconds in times]
    result = {
        "machine": describe(),
        "passes": arguments.passes,
        "load": arguments.load,
        **figures(every),
        "tests": {test: figures(times) for test, times in sorted(by_test.items())},
    }
    arguments.output.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print(f"{arguments.output}: {figures(every)}")


def figures(seconds: list[float]) -> dict[str, float]:
    percentiles = (
        statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    )
    return {
        "waits": len(seconds),
        "p50_s": round(percentiles[49], 3),
        "p90_s": round(percentiles[89], 3),
        "p99_s": round(percentiles[98], 3),
        "max_s": max(seconds),
        f"over_{WANTED_S:g}_s": sum(value > WANTED_S for value in seconds),
    }


if __name__ == "__main__":
    main()
