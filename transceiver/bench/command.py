"""The command behind `trtllm-serve kv-bench`: settings in, table, JSON and plot out."""

from dataclasses import dataclass
from pathlib import Path

import click

from diptych.errors import ConfigError
from diptych.transceiver.bench.cases import TOKENS, suite
from diptych.transceiver.packages import missing_package

_TRANSPORTS = {"cpu": ("shm", "tcp", "nixl", "ucx"), "cuda": ("cuda_ipc", "tcp", "nixl", "ucx")}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    device: str | None = None  # None: cuda where there is a GPU
    shape: str | None = None  # None: 8b on GPUs, 135m else
    tokens: tuple[int, ...] = ()
    transports: tuple[str, ...] = ()  # empty: all that are installed
    per_layer: bool = False
    rounds: int = 9
    output: Path | None = None
    plot: Path | None = None


def run(settings: BenchSettings) -> None:
    device = settings.device or ("cuda" if Path("/dev/nvidiactl").exists() else "cpu")
    shape = settings.shape or ("8b" if device == "cuda" else "135m")
    transports = settings.transports or tuple(
        name for name in _TRANSPORTS[device] if missing_package(name) is None
    )
    wrong = set(transports) - set(_TRANSPORTS[device])
    if wrong:
        raise ConfigError(
            f"--transport is {', '.join(sorted(wrong))}, allowed with device {device} are "
            f"{', '.join(_TRANSPORTS[device])}"
        )
    tokens = settings.tokens or (TOKENS if device == "cuda" else TOKENS[:-1])
    planned = suite(
        shape, tuple(sorted(tokens)), transports, on_gpu=device == "cuda", per_layer=settings.per_layer
    )

    from diptych.transceiver.bench.report import plot, require_plots, table, write_json
    from diptych.transceiver.bench.run import prepare

    if settings.plot is not None:
        require_plots()
    bench = prepare(planned, device)
    rows = []
    try:
        for case in planned.cases:
            rows.append(bench.measure(case, settings.rounds))
            click.echo(table(rows[-1:]).splitlines()[1] if len(rows) > 1 else table(rows))
            if settings.output is not None:  # after each: a run that is cut short has not been for nothing
                write_json(settings.output, rows, shape, device, settings.rounds)
    finally:
        bench.close()
    if settings.plot is not None:
        plot(settings.plot, rows, shape)
