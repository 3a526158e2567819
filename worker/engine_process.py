"""The engine process: `python -m diptych.worker.engine_process ENDPOINT`, settings as msgpack on standard input.

Its parent is the worker's HTTP process (see engine_client.py); it dies with it.
"""

import ctypes
import gc
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from diptych import logs
from diptych.errors import DiptychError, ModelLoadError, StartupError
from diptych.kv_layout import KvLayout
from diptych.model_source import model_digest
from diptych.wire import EngineFailed, EngineProgress, EngineReady
from diptych.worker.blocks import BlockPool
from diptych.worker.kv_memory import create_pool, num_blocks, require_device, usable_transports
from diptych.worker.link import EngineLink
from diptych.worker.scheduler import Scheduler, SchedulerLimits
from diptych.worker.settings import EngineSettings

if TYPE_CHECKING:
    from diptych.worker.engine import Engine
    from diptych.worker.models.build import Model
    from diptych.worker.models.config import ModelConfig

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PROGRESS_STEP = 0.05


def main() -> None:
    _die_with_parent()
    settings = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineSettings)
    logs.configure(settings.log_level)
    link = EngineLink(sys.argv[1])
    try:
        engine = _build(settings, link)
    except StartupError as error:
        link.send(EngineFailed(message=error.message))
        link.close()
        sys.exit(2)
    # Garbage collection pauses are step pauses: what the start left behind is here for good.
    gc.collect()
    gc.freeze()
    try:
        engine.run()
    finally:
        engine.close()
        link.close()


def _die_with_parent() -> None:
    # Ctrl-C reaches the whole foreground group: the parent decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _build(settings: EngineSettings, link: EngineLink) -> "Engine":
    started = time.monotonic()
    link.send(EngineProgress(message="importing torch"))
    import torch

    from diptych.transceiver.host_limits import HostLimits
    from diptych.transceiver.settings import TransceiverSettings
    from diptych.transceiver.ticket import encode_rank
    from diptych.transceiver.transceiver import Transceiver
    from diptych.worker.engine import Engine
    from diptych.worker.runner import ModelRunner
    from diptych.worker.sampler import Sampler

    require_device(settings.device)
    torch.set_num_threads(settings.num_threads)
    torch.set_grad_enabled(False)
    path = Path(settings.model_path)
    config, model = _load(settings, path, link)
    layout = KvLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tokens_per_block=settings.tokens_per_block,
        dtype=model.kv_dtype,
        inner=model.inner,
        model="dummy" if settings.load_format == "dummy" else model_digest(path),
    )
    count = num_blocks(settings, layout)
    link.send(EngineProgress(message=f"allocating {count} KV blocks"))
    memory, tensor = create_pool(settings, layout, count)
    model.bind(tensor)
    max_seq_len = min(
        settings.max_seq_len or config.max_position_embeddings,
        config.max_position_embeddings,
        count * layout.tokens_per_block,
    )
    eos = frozenset(config.eos_token_ids)
    limits = SchedulerLimits(
        max_batch_size=settings.max_batch_size,
        max_num_tokens=settings.max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=layout.tokens_per_block,
        capacity_policy=settings.capacity_policy,
        eos_token_ids=eos,
    )
    pool = BlockPool(count, reuse=settings.enable_block_reuse, generations=memory.generations)
    transceiver = Transceiver(
        memory,
        layout,
        TransceiverSettings(
            backends=usable_transports(settings),
            optional_backends=settings.optional_transports,
            measure_transports=settings.measure_transports,
            max_tokens_in_flight=settings.max_tokens_in_flight,
            bind_host=settings.transceiver_host,
            lease_s=settings.lease_s,
            timeout_s=settings.kv_transfer_timeout_s,
            secret=settings.secret,
        ),
        wake=link.wake,
    )
    for concern in HostLimits.read().concerns(transceiver.describe().transports, memory.identity.host_bytes):
        log.warning("%s", concern)
    engine = Engine(
        link,
        Scheduler(limits, pool),
        ModelRunner(model, Sampler(eos)),
        transceiver,
        collect_iterations=settings.iteration_stats,
        follow_patience_s=settings.kv_transfer_timeout_s,
    )
    link.send(
        EngineReady(
            pid=os.getpid(),
            incarnation=settings.incarnation,
            max_seq_len=max_seq_len,
            vocab_size=config.vocab_size,
            layout=msgspec.to_builtins(layout) | {"fingerprint": layout.fingerprint()},
            num_blocks=count,
            pool_bytes=count * layout.block_bytes,
            device=settings.device,
            max_batch_size=settings.max_batch_size,
            kv_peer=encode_rank(transceiver.describe()),
            kv_endpoint=transceiver.endpoint,
            kernel=model.kernel_name,
            load_s=time.monotonic() - started,
        )
    )
    return engine


def _load(settings: EngineSettings, path: Path, link: EngineLink) -> "tuple[ModelConfig, Model]":
    import torch

    from diptych.worker.models.build import build_model
    from diptych.worker.models.loader import dummy_weights, load_config, load_weights

    shown = 0.0

    def progress(fraction: float) -> None:
        nonlocal shown
        if fraction - shown >= _PROGRESS_STEP:
            shown = fraction
            link.send(EngineProgress(message="loading weights", fraction=fraction))

    try:
        config = load_config(path)
        if settings.load_format == "dummy":
            weights = dummy_weights(config)
        else:
            weights = load_weights(path, config, progress)
        model = build_model(
            config,
            weights,
            torch.device(settings.device),
            kernel=settings.kernel,
            num_threads=settings.num_threads,
            tokens_per_block=settings.tokens_per_block,
        )
    except DiptychError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        log.exception("loading %s failed", path)
        raise ModelLoadError(f"cannot load the model at {path}: {type(error).__name__}: {error}") from error
    return config, model


if __name__ == "__main__":
    main()
