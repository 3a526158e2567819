"""Records to figures: distributions in milliseconds, throughput, errors, and ratios between targets."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from serving.load import Run
from serving.request import Record

PERCENTILES = (50, 90, 99)
METRICS = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles (linear between neighbours); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    figures = {"mean": sum(ordered) / len(ordered)}
    for percentile in PERCENTILES:
        position = (len(ordered) - 1) * percentile / 100
        below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
        figures[f"p{percentile}"] = below + (above - below) * (position - math.floor(position))
    return {name: round(value, 3) for name, value in figures.items()}


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """All rounds of one target under one load as one result."""
    records = [record for run in runs for record in run.records]
    good = [record for record in records if record.error is None]
    wall_s = sum(run.wall_s for run in runs)
    output_tokens = sum(record.output_tokens for record in good)
    prompt_tokens = [record.prompt_tokens for record in good if record.prompt_tokens is not None]
    return {
        "requests": len(records),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "wrong_length": sum(record.output_tokens != record.wanted_tokens for record in good),
        "tokens_counted_by": _counted_by(good),
        "wall_s": round(wall_s, 3),
        "client_cpu_s": round(sum(run.client_cpu_s for run in runs), 3),
        "prompt_tokens_mean": round(sum(prompt_tokens) / len(prompt_tokens), 1) if prompt_tokens else None,
        "output_tokens": output_tokens,
        "requests_per_s": round(len(good) / wall_s, 4),
        "output_tokens_per_s": round(output_tokens / wall_s, 3),
        "output_tokens_per_s_rounds": [
            round(sum(record.output_tokens for record in run.records if record.error is None) / run.wall_s, 3)
            for run in runs
        ],
        "ttft_ms": distribution([record.ttft_s * 1e3 for record in good if record.ttft_s is not None]),
        "itl_ms": distribution([gap * 1e3 for record in good for gap in record.gaps_s]),
        "tpot_ms": distribution([record.tpot_s * 1e3 for record in good if record.tpot_s is not None]),
        "e2e_ms": distribution([record.end_s * 1e3 for record in good]),
    }


def ratios(result: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """How many times the base: more is better for throughput, less for times."""
    found: dict[str, float] = {}
    for name in ("requests_per_s", "output_tokens_per_s"):
        if base[name]:
            found[name] = round(result[name] / base[name], 3)
    for name in METRICS:
        if result[name] and base[name] and base[name]["p50"]:
            found[f"{name}_p50"] = round(result[name]["p50"] / base[name]["p50"], 3)
    return found


def table(label: str, results: dict[str, dict[str, Any]]) -> str:
    """Results of one load for people."""
    header = f"{label:<26}{'tok/s':>9}{'req/s':>8}" + "".join(
        f"{name:>10}" for name in ("TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", "E2E p50", "errors")
    )
    lines = [header]
    for name, result in results.items():
        cells = [
            _cell(result, metric, key)
            for metric, key in (
                ("ttft_ms", "p50"),
                ("ttft_ms", "p99"),
                ("tpot_ms", "p50"),
                ("tpot_ms", "p99"),
                ("itl_ms", "p99"),
                ("e2e_ms", "p50"),
            )
        ]
        bad = sum(result["errors"].values())
        note = f"{bad}" if not result["wrong_length"] else f"{bad} (+{result['wrong_length']} length)"
        numbers = f"{result['output_tokens_per_s']:>9.1f}{result['requests_per_s']:>8.2f}"
        ratio = result.get("ratio_to_first", {}).get("output_tokens_per_s")
        suffix = f"  x{ratio:g}" if ratio is not None else ""
        lines.append(
            f"  {name:<24}{numbers}" + "".join(f"{cell:>10}" for cell in cells) + f"{note:>10}{suffix}"
        )
    return "\n".join(lines)


def _cell(result: dict[str, Any], metric: str, key: str) -> str:
    return "-" if result[metric] is None else f"{result[metric][key]:.1f}"


def _counted_by(records: Sequence[Record]) -> str:
    by_server = {record.counted_by_server for record in records}
    if not by_server:
        return "nobody"
    return "server" if by_server == {True} else "events"
