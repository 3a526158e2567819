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
from typing import TYPE_CHECKING, Any

import msgspec

from diptych import logs
from diptych.errors import StartupError
from diptych.kv_layout import KvLayout
from diptych.model_source import model_digest
from diptych.wire import EngineFailed, EngineProgress, EngineReady
from diptych.worker.blocks import BlockPool
from diptych.worker.kv_memory import create_pool, num_blocks, require_device, usable_transports
from diptych.worker.link import EngineLink
from diptych.worker.plan import SchedulerLimits
from diptych.worker.scheduler import Scheduler
from diptych.worker.settings import EngineSettings

if TYPE_CHECKING:
    from diptych.worker.engine import Engine

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


def _build(settings: EngineSettings, link: EngineLink) -> "Engine[Any]":
    started = time.monotonic()
    link.send(EngineProgress(message="importing torch"))
    import torch

    from diptych.transceiver.host_limits import HostLimits
    from diptych.transceiver.settings import TransceiverSettings
    from diptych.transceiver.ticket import encode_rank
    from diptych.transceiver.transceiver import Transceiver
    from diptych.worker.computer import load_computer
    from diptych.worker.engine import Engine
    from diptych.worker.models.loader import load_config

    require_device(settings.device)
    torch.set_num_threads(settings.num_threads)
    torch.set_grad_enabled(False)
    path = Path(settings.model_path)
    config = load_config(path)
    show = _ProgressBar(link)
    computer = load_computer(settings, config, show)
    layout = KvLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tokens_per_block=settings.tokens_per_block,
        dtype=computer.kv_dtype,
        inner=computer.inner,
        model="dummy" if settings.load_format == "dummy" else model_digest(path),
    )
    count = num_blocks(settings, layout, reserved_bytes=computer.reserved_bytes())
    link.send(EngineProgress(message=f"allocating {count} KV blocks"))
    memory, tensor = create_pool(settings, layout, count)
    max_seq_len = min(
        settings.max_seq_len or config.max_position_embeddings,
        config.max_position_embeddings,
        count * layout.tokens_per_block,
    )
    limits = SchedulerLimits(
        max_batch_size=settings.max_batch_size,
        max_num_tokens=settings.max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=layout.tokens_per_block,
        capacity_policy=settings.capacity_policy,
        eos_token_ids=frozenset(config.eos_token_ids),
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
        computer.start(tensor, max_seq_len, show),
        transceiver,
        overlap=settings.overlap and computer.overlaps,
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
            kernel=computer.kernel_name,
            load_s=time.monotonic() - started,
        )
    )
    return engine


class _ProgressBar:
    """Tells the parent what begins, and about every twentieth of it."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._message = ""
        self._shown = 0.0

    def __call__(self, message: str, fraction: float) -> None:
        if message != self._message or fraction - self._shown >= _PROGRESS_STEP:
            self._message, self._shown = message, fraction
            self._link.send(EngineProgress(message=message, fraction=fraction))


if __name__ == "__main__":
    main()
