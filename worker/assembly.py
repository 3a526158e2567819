"""What every rank of an engine is made of: a model on its device, a KV pool, a transceiver.

The same on rank 0, which adds the scheduler (engine_process.py), and on the others (rank_process.py).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diptych.kv_layout import KvLayout
from diptych.model_source import model_digest
from diptych.transceiver.companions import NO_COMPANIONS, Companions
from diptych.transceiver.host_limits import HostLimits
from diptych.transceiver.pool import KvPool
from diptych.transceiver.settings import TransceiverSettings
from diptych.transceiver.transceiver import Transceiver
from diptych.worker.collectives import Collectives
from diptych.worker.computer import Computer, Progress, load_computer
from diptych.worker.kv_memory import num_blocks, usable_transports
from diptych.worker.models.config import ModelConfig
from diptych.worker.settings import EngineSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A rank with its weights on its device, before it has a pool."""

    computer: Computer
    layout: KvLayout
    num_blocks: int  # that the rank could hold


def prepare(settings: EngineSettings) -> None:
    """The process, before anything is put on the device."""
    torch.set_num_threads(settings.num_threads)
    torch.set_grad_enabled(False)


def load(settings: EngineSettings, config: ModelConfig, ranks: Collectives, show: Progress) -> Loaded:
    """`config` is the whole model's. All ranks load at the same time: the largest step is tried out together."""
    dims = settings.dims
    computer = load_computer(settings, config, show, ranks)
    layout = KvLayout(
        num_layers=config.num_layers,
        num_kv_heads=len(dims.part(config.num_kv_heads)),
        total_kv_heads=config.num_kv_heads if dims.tp_size > 1 else None,
        head_dim=config.head_dim,
        tokens_per_block=settings.tokens_per_block,
        dtype=computer.kv_dtype,
        inner=computer.inner,
        tp_rank=dims.tp_rank,
        tp_size=dims.tp_size,
        model="dummy" if settings.load_format == "dummy" else model_digest(Path(settings.model_path)),
    )
    return Loaded(computer, layout, num_blocks(settings, layout, reserved_bytes=computer.reserved_bytes()))


def open_transceiver(
    settings: EngineSettings,
    memory: KvPool,
    layout: KvLayout,
    wake: Callable[[], None],
    companions: Companions = NO_COMPANIONS,
) -> Transceiver:
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
        wake=wake,
        companions=companions,
    )
    for concern in HostLimits.read().concerns(transceiver.describe().transports, memory.identity.host_bytes):
        log.warning("%s", concern)
    return transceiver
