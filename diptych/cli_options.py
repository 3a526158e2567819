"""The options of `serve`, with TensorRT-LLM's names, and nothing else.

No option has a default here: what the user did not write stays away, and the YAML file and the dataclasses
decide.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from diptych.logs import LEVEL_NAMES

F = TypeVar("F", bound=Callable[..., Any])

_Positive = click.IntRange(min=1)


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, **{"default": None, **settings})


def flag(*names: str, **settings: Any) -> Callable[[F], F]:
    return option(*names, is_flag=True, **settings)


def log_level(*names: str) -> Callable[[F], F]:
    return option(
        *names,
        "log_level",
        type=click.Choice(LEVEL_NAMES, case_sensitive=False),
        help="Logging level [info].",
    )


_SERVE: tuple[Callable[[Any], Any], ...] = (
    option("--tokenizer", help="Path or name of the tokenizer, when it is not with the model."),
    option("--custom_tokenizer", help="Accepted, no effect."),
    option("--served_model_name", help="The name clients use [last part of MODEL]."),
    option("--revision", "--hf_revision", "revision", help="Revision on the model hub."),
    flag("--trust_remote_code", help="Allow code that comes with the model."),
    option("--load_format", type=click.Choice(["auto", "dummy"]), help="dummy: random weights [auto]."),
    option("--chat_template", help="A file with the chat template, or the template itself."),
    option("--host", help="Address to listen on [localhost]."),
    option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one [8000]."),
    option("--listen_fd", type=click.IntRange(min=0), hidden=True),
    option("--server_role", help="CONTEXT or GENERATION, in any case [both]."),
    option("--metadata_server_config_file", "-m", help="YAML file that says where etcd is."),
    option("--disagg_cluster_uri", help="Service discovery to register with."),
    option("--backend", help="pytorch, tensorrt or trt: all the same here."),
    option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[auto: cuda when there is a GPU]."),
    option("--num_threads", type=_Positive, help="CPU threads of the engine [one for each core]."),
    option("--max_batch_size", type=_Positive, help="Sequences in one step [2048; on a CPU 64]."),
    option("--max_num_tokens", type=_Positive, help="Tokens in one step [8192; on a CPU 512]."),
    option("--max_seq_len", type=_Positive, help="Prompt and output together [the model's length]."),
    option("--max_beam_width", type=_Positive, help="Only 1."),
    option("--tensor_parallel_size", "--tp_size", "tp_size", type=_Positive, help="[1]"),
    option("--pipeline_parallel_size", "--pp_size", "pp_size", type=_Positive, help="[1]"),
    option("--context_parallel_size", "--cp_size", "cp_size", type=_Positive, help="[1]"),
    option("--moe_expert_parallel_size", "--ep_size", "ep_size", type=_Positive, help="[1]"),
    option("--moe_cluster_parallel_size", "--cluster_size", "cluster_size", type=_Positive, help="[1]"),
    option("--gpus_per_node", type=_Positive, help="Accepted, no effect."),
    option(
        "--free_gpu_memory_fraction",
        "--kv_cache_free_gpu_memory_fraction",
        "free_gpu_memory_fraction",
        type=float,
        help="Part of the free memory that the KV cache takes [0.9].",
    ),
    option("--kv_cache_dtype", help="[auto]"),
    flag("--enable_chunked_prefill/--no_enable_chunked_prefill", help="[on]"),
    option(
        "--extra_llm_api_options", "--config", "config_file", help="YAML file; it wins over the command line."
    ),
    option("--reasoning_parser", help="Accepted, no effect."),
    option("--tool_parser", help="Accepted, no effect."),
    option("--num_postprocess_workers", type=click.IntRange(min=0), help="Accepted, no effect."),
    option("--custom_module_dirs", multiple=True, help="Accepted, no effect."),
    option("--media_io_kwargs", help="Accepted, no effect."),
    option("--otlp_traces_endpoint", help="Accepted, no effect."),
    flag("--fail_fast_on_attention_window_too_large", help="Accepted, no effect."),
    flag("--enable_attention_dp", help="Accepted, no effect."),
    flag("--telemetry/--no-telemetry", help="Accepted, no effect: nothing is ever sent."),
    flag("--grpc", help="Not supported."),
    log_level("--log_level", "-l"),
)


def serve_options(command: F) -> F:
    for decorate in reversed(_SERVE):
        command = decorate(command)
    return command
