"""The command `trtllm-serve`. Each command turns its arguments into a configuration and hands it on.

Whatever a command needs is imported inside it: `trtllm-serve version` must not load a web server or torch.
"""

import difflib
import os
from pathlib import Path
from typing import Any

import click

from diptych import __version__, logs
from diptych.cli_options import flag, log_level, option, serve_options
from diptych.errors import ConfigError, StartupError


class StartupFailure(click.ClickException):
    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True, file=file)


class ServeByDefault(click.Group):
    """`trtllm-serve MODEL` means `trtllm-serve serve MODEL`; a StartupError is one line and exit code 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in ("--help", "-h", "--version"):
            word = args[0].replace("-", "_") if not args[0].startswith("-") else args[0]
            if word not in self.commands:
                self._refuse_misspelt(args[0])
                args = ["serve", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StartupError as error:
            raise StartupFailure(error.message) from error

    def _refuse_misspelt(self, word: str) -> None:
        nearest = difflib.get_close_matches(word, self.commands, n=1, cutoff=0.8)
        if nearest and not Path(word).exists():
            raise click.UsageError(
                f'"{word}" is neither a command nor a model here; did you mean "{nearest[0]}"?'
            )


@click.group(
    cls=ServeByDefault,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Underscores as in TensorRT-LLM, dashes for those who expect them.
        "token_normalize_func": lambda token: token.replace("-", "_"),
        "max_content_width": 110,
    },
)
@click.version_option(__version__, message="%(version)s")
def main() -> None:
    """Serve language models, with prefill and decode on separate workers."""
    # Set by the launcher: a process that it started must not outlive it.
    parent = os.environ.pop("DIPTYCH_PARENT_PID", None)
    if parent is not None:
        from diptych.launcher.parent import die_with_parent

        die_with_parent(int(parent))


@main.command()
@click.argument("model")
@serve_options
def serve(model: str, **options: Any) -> None:
    """Serve MODEL, a directory, a GGUF file or a name, with an OpenAI API: one worker."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    logs.configure(given.get("log_level", "info"))
    if given.pop("grpc", False):
        raise ConfigError("--grpc is not supported: workers speak HTTP")
    for name in ("metadata_server_config_file", "disagg_cluster_uri"):
        if name in given and "server_role" not in given:
            raise ConfigError(f"--{name} needs --server_role CONTEXT or GENERATION")
    places = _places(given)
    given.pop("telemetry", None)

    from dataclasses import replace

    from diptych.config import load_llm_config
    from diptych.listen import open_listener

    config = replace(load_llm_config(model, given, given.pop("config_file", None)), **places)
    if config.metadata_server is not None and config.disagg_cluster is not None:
        raise ConfigError(
            "a worker registers in one place: --metadata_server_config_file or a disagg_cluster"
        )
    logs.configure(config.log_level)
    # Bound before the model loads: minutes of loading must not end in "port in use".
    with open_listener(config.host, config.port, fd=config.listen_fd) as listener:
        config = replace(config, listen_fd=listener.fileno(), port=listener.getsockname()[1])
        from diptych.worker.app import run

        run(config)


@main.command()
@click.argument("model")
@serve_options
def warmup(model: str, **options: Any) -> None:
    """Compile and cache what serving MODEL with these options needs; its weights are not read."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    logs.configure(given.get("log_level", "warning"))
    _places(given)

    from diptych.config import load_llm_config
    from diptych.worker.warmup import run

    for name in ("grpc", "telemetry"):
        given.pop(name, None)
    ready = run(load_llm_config(model, given, given.pop("config_file", None)), click.echo)
    click.echo(f"{ready.kernel} kernels are ready, in {ready.load_s:.1f} s")


@main.command()
@option("--config_file", "--config", "-c", "config_file", required=True, help="The disaggregated YAML file.")
@option("--metadata_server_config_file", "-m", help="YAML file that says where etcd is.")
@option("--server_start_timeout", "-t", type=click.FloatRange(min=0, min_open=True), help="Seconds [180].")
@option("--request_timeout", "-r", type=click.FloatRange(min=0, min_open=True), help="Seconds [180].")
@option("--schedule_style", "-s", type=click.Choice(["context_first", "generation_first"]))
@option("--metrics_log_interval", type=int, help="Accepted, no effect: see /prometheus/metrics.")
@option("--api_key", multiple=True, help="A key that clients must show; may be given several times [none].")
@option("--listen_fd", type=click.IntRange(min=0), hidden=True)
@log_level("--log_level", "-l")
def disaggregated(config_file: str, **options: Any) -> None:
    """Run the router in front of context and generation workers."""
    given = {name: value for name, value in options.items() if value is not None}
    logs.configure(given.get("log_level", "info"))

    from dataclasses import replace

    from diptych.config import load_disagg_config
    from diptych.listen import open_listener

    given.pop("metrics_log_interval", None)
    if api_keys := given.pop("api_key", ()):
        given["api_keys"] = list(api_keys)
    for ours, theirs in (
        ("request_timeout_s", "request_timeout"),
        ("server_start_timeout_s", "server_start_timeout"),
    ):
        if theirs in given:
            given[ours] = given.pop(theirs)
    places = _places(given)
    config = replace(load_disagg_config(config_file, given), **places)
    logs.configure(config.log_level)
    config.require_urls(config_file)
    # Only to learn the port and whether it is free: the router opens its own listeners, one a process.
    with open_listener(config.hostname, config.port, fd=config.listen_fd) as listener:
        config = replace(config, listen_fd=None, port=listener.getsockname()[1])
    _run_router(config)


@main.command()
@option(
    "--config_file",
    "--config",
    "-c",
    "config_file",
    help="A disaggregated YAML file [1 context, 1 generation].",
)
@option("--port", type=click.IntRange(0, 65535), help="The router's port [from the file, else 8000].")
@log_level("--log_level", "-l")
def up(config_file: str | None, port: int | None, log_level: str | None) -> None:
    """Start the workers and the router that a YAML file describes, all on this machine."""
    logs.configure(log_level or "warning")
    from diptych.config import load_disagg_config
    from diptych.launcher import default_config, run

    overrides = {} if port is None else {"port": port}
    config = load_disagg_config(config_file, overrides) if config_file else default_config(overrides)
    raise SystemExit(run(config, log_level=log_level or "info"))


@main.command("disaggregated_mpi_worker")
@option("--config_file", "-c", "config_file", required=True, help="The disaggregated YAML file.")
@log_level("--log_level", "-l")
def disaggregated_mpi_worker(config_file: str, log_level: str | None) -> None:
    """Start all workers of a YAML file on this machine, without a router (deprecated; see `up`)."""
    logs.configure(log_level or "warning")
    # mpirun starts as many copies as TensorRT-LLM has ranks; one of them starts everything.
    rank = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
    if rank != "0":
        return
    from diptych.config import load_disagg_config
    from diptych.launcher import run

    raise SystemExit(run(load_disagg_config(config_file), with_router=False, log_level=log_level or "info"))


@main.command()
@flag("--once", help="Leave after the first answer.")
@option("--prompt", help="What to ask.")
@option("--port", type=click.IntRange(0, 65535), help="The router's port [8000, or a free one].")
def demo(once: bool | None, prompt: str | None, port: int | None) -> None:
    """Start the small model on one context and one generation worker and ask it something."""
    logs.configure("warning")
    from diptych.demo import run

    raise SystemExit(run(once=bool(once), prompt=prompt, port=port))


@main.command()
@click.argument("worker")
@option(
    "--metadata_server_config_file", "-m", help="YAML file that says where etcd is, to find WORKER by its id."
)
@option("--disagg_cluster_uri", help="Where WORKER is registered, to find it by its id.")
def drain(worker: str, **options: Any) -> None:
    """Let WORKER, an address or a worker id, finish what it does and then end."""
    logs.configure("warning")
    from diptych.drain import run
    from diptych.trust import ClusterTrust

    places = _places({name: value for name, value in options.items() if value is not None})
    metadata, cluster = places.get("metadata_server"), places.get("disagg_cluster")
    click.echo(run(worker, metadata, cluster, ClusterTrust(None)))


@main.command("kv_bench")
@option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where the KV pools are [cuda on a GPU machine]."
)
@option("--shape", type=click.Choice(["8b", "135m"]), help="Shape of the KV [8b on GPUs, 135m else].")
@option("--tokens", "-n", multiple=True, type=click.IntRange(min=1), help="Length; repeatable.")
@option(
    "--transport",
    "transports",
    multiple=True,
    help="shm, cuda_ipc, tcp, nixl or ucx; repeatable [all that are installed].",
)
@option("--per_layer", is_flag=True, help="Also with a pool that keeps each layer of a block elsewhere.")
@option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@option("--output", "-o", type=click.Path(path_type=Path), help="JSON file for the figures.")
@option("--plot", type=click.Path(path_type=Path), help="PNG file for a plot.")
def kv_bench(**options: Any) -> None:
    """Measure how fast KV blocks move between two processes here, beside the link's plain copy."""
    from diptych.transceiver.bench.command import BenchSettings, run

    run(BenchSettings(**options))


@main.command()
@option("--peer", help="HOST:PORT of a worker, or of a doctor that listens: measure the way to it.")
@option("--listen", type=click.IntRange(0, 65535), help="Be such a peer on this port, until Ctrl-C.")
@option("--host", help="Address to listen on [0.0.0.0].")
@option("--metadata_server_config_file", "-m", help="YAML file that says where etcd is: can it be reached?")
@flag("--json", "as_json", help="Print JSON.")
def doctor(
    peer: str | None,
    listen: int | None,
    host: str | None,
    metadata_server_config_file: str | None,
    as_json: bool | None,
) -> None:
    """Say what a worker would find on this host; exit code 0 when it could serve, 1 when not."""
    logs.configure("error")
    from diptych.transceiver.doctor import command

    if listen is not None:
        command.listen(host or "0.0.0.0", listen)
        return
    places = _places({"metadata_server_config_file": metadata_server_config_file})
    settings = command.DoctorSettings(
        peer=peer, metadata=places.get("metadata_server"), as_json=bool(as_json)
    )
    raise SystemExit(command.run(settings))


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def _run_router(config: Any) -> None:
    from diptych.discovery.connect import router_registry
    from diptych.router.server import serve

    serve(config, router_registry)


def _places(given: dict[str, Any]) -> dict[str, Any]:
    """Takes the options that say where workers register out of `given`, as settings."""
    from diptych.config import cluster_from_uri, load_metadata_config

    places: dict[str, Any] = {}
    metadata, uri = given.pop("metadata_server_config_file", None), given.pop("disagg_cluster_uri", None)
    if metadata is not None:
        places["metadata_server"] = load_metadata_config(metadata)
    if uri is not None:
        places["disagg_cluster"] = cluster_from_uri(uri, source="--disagg_cluster_uri")
    return places


if __name__ == "__main__":
    main()
