"""The engine process: `python -m diptych.worker.engine_process ENDPOINT`, settings as msgpack on standard input.

Its parent is the worker's HTTP process (see engine_client.py); it dies with it. It is rank 0 of the engine, and starts
the others.
"""

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from diptych import logs
from diptych.errors import StartupError
from diptych.wire import EngineFailed, EngineProgress, EngineReady
from diptych.worker.blocks import BlockPool
from diptych.worker.kv_memory import create_pool, device_bytes_in_use, require_device
from diptych.worker.link import EngineLink
from diptych.worker.plan import SchedulerLimits
from diptych.worker.process import end_with_parent
from diptych.worker.rank_group import RankGroup
from diptych.worker.scheduler import Scheduler
from diptych.worker.settings import EngineSettings

if TYPE_CHECKING:
    from diptych.transceiver.transceiver import Transceiver
    from diptych.worker.assembly import Loaded
    from diptych.worker.collectives import Collectives
    from diptych.worker.engine import Engine
    from diptych.worker.models.config import ModelConfig

log = logging.getLogger("diptych.worker.engine_process")  # this module is __main__

_PROGRESS_STEP = 0.05


def main() -> None:
    end_with_parent()
    settings = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineSettings)
    logs.configure(settings.log_level)
    code = 1
    try:
        code = _run(settings)
    except Exception:
        log.exception("the engine failed")
    finally:
        # Communicators and threads of libraries may wait for ranks that are gone.
        os._exit(code)


def _run(settings: EngineSettings) -> int:
    """Until it is told to end; the exit code."""
    with ExitStack() as stack:
        link = EngineLink(sys.argv[1])
        stack.callback(link.close)
        watch = _Watch(link)
        group = _start_ranks(settings, watch, stack)
        try:
            with _no_error_but_a_lost_ranks(group):
                engine = _build(settings, link, group)
        except StartupError as error:
            link.send(EngineFailed(message=error.message))
            return 2
        stack.callback(engine.close)
        # Garbage collection pauses are step pauses: what the start left behind is here for good.
        gc.collect()
        gc.freeze()
        watch.is_ready = True
        with _no_error_but_a_lost_ranks(group):
            engine.run()
    return 0


@contextmanager
def _no_error_but_a_lost_ranks(group: RankGroup | None) -> Iterator[None]:
    """What a collective says when a rank is gone is not the reason: that comes from the rank's own end."""
    try:
        yield
    except Exception:
        if group is not None:
            group.wait_for_end()
        raise


class _Watch:
    """What becomes of the engine when another rank is gone: it ends, whatever its threads wait for."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self.is_ready = False

    def lost(self, sentence: str) -> None:
        log.critical("%s: the engine ends", sentence)
        if not self.is_ready:
            self._link.end_with(EngineFailed(message=sentence))
        os._exit(3)


def _start_ranks(settings: EngineSettings, watch: _Watch, stack: ExitStack) -> RankGroup | None:
    if settings.dims.tp_size == 1:
        return None
    group = RankGroup(settings, watch.lost)
    stack.callback(group.close)
    return group


def _build(settings: EngineSettings, link: EngineLink, group: RankGroup | None) -> "Engine[Any]":
    started = time.monotonic()
    link.send(EngineProgress(message="importing torch"))
    from diptych.worker import assembly
    from diptych.worker.models.loader import load_config

    device = require_device(settings)
    assembly.prepare(settings)
    config = load_config(Path(settings.model_path))
    settings.dims.local(config)  # an error now, and of one rank
    show = _ProgressBar(link)
    loaded = assembly.load(settings, config, _meet(settings, group, device), show)
    count = loaded.num_blocks if group is None else min(loaded.num_blocks, group.wait_loaded())
    link.send(EngineProgress(message=f"allocating {count} KV blocks"))
    limits = _limits(settings, config, count)
    if group is not None:
        group.begin(count, limits.max_seq_len)
    engine, transceiver = _assemble(settings, loaded, limits, _Parts(link, group, show), count)
    link.send(_ready(settings, config, loaded, transceiver, limits, count, time.monotonic() - started))
    return engine


def _meet(settings: EngineSettings, group: RankGroup | None, device: Any) -> "Collectives":
    from diptych.worker.collectives import ALONE, ProcessGroup, open_store

    if group is None:
        return ALONE
    place = open_store()
    group.meet(place)
    return ProcessGroup(place, 0, settings.dims.tp_size, device)


def _limits(settings: EngineSettings, config: "ModelConfig", num_blocks: int) -> SchedulerLimits:
    longest = config.max_position_embeddings
    return SchedulerLimits(
        max_batch_size=settings.max_batch_size,
        max_num_tokens=settings.max_num_tokens,
        max_seq_len=min(settings.max_seq_len or longest, longest, num_blocks * settings.tokens_per_block),
        tokens_per_block=settings.tokens_per_block,
        capacity_policy=settings.capacity_policy,
        eos_token_ids=frozenset(config.eos_token_ids),
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    link: EngineLink
    group: RankGroup | None
    show: "_ProgressBar"


def _assemble(
    settings: EngineSettings, loaded: "Loaded", limits: SchedulerLimits, parts: _Parts, num_blocks: int
) -> "tuple[Engine[Any], Transceiver]":
    from diptych.transceiver.companions import NO_COMPANIONS
    from diptych.worker import assembly
    from diptych.worker.engine import Engine
    from diptych.worker.rank_companions import RankCompanions
    from diptych.worker.step_mirror import LeadingRunner

    memory, tensor = create_pool(settings, loaded.layout, num_blocks)
    group = parts.group
    fetch_s = settings.kv_transfer_timeout_s + settings.lease_s  # its deadline, then a copy that lingers
    companions = NO_COMPANIONS if group is None else RankCompanions(group, fetch_s)
    transceiver = assembly.open_transceiver(settings, memory, loaded.layout, parts.link.wake, companions)
    runner = loaded.computer.start(tensor, limits.max_seq_len, parts.show)
    generations: Any = memory.generations
    if group is not None:
        generations = group.wait_started(memory)
        runner = LeadingRunner(runner, group)
    pool = BlockPool(num_blocks, reuse=settings.enable_block_reuse, generations=generations)
    engine = Engine(
        parts.link,
        Scheduler(limits, pool),
        runner,
        transceiver,
        overlap=settings.overlap and loaded.computer.overlaps,
        collect_iterations=settings.iteration_stats,
        device_bytes=lambda: device_bytes_in_use(settings.device),
        follow_patience_s=settings.kv_transfer_timeout_s,
    )
    return engine, transceiver


def _ready(
    settings: EngineSettings,
    config: "ModelConfig",
    loaded: "Loaded",
    transceiver: "Transceiver",
    limits: SchedulerLimits,
    num_blocks: int,
    load_s: float,
) -> EngineReady:
    from diptych.transceiver.ticket import encode_rank

    layout = loaded.layout
    return EngineReady(
        pid=os.getpid(),
        incarnation=settings.incarnation,
        max_seq_len=limits.max_seq_len,
        vocab_size=config.vocab_size,
        layout=msgspec.to_builtins(layout) | {"fingerprint": layout.fingerprint()},
        num_blocks=num_blocks,
        pool_bytes=num_blocks * layout.block_bytes,
        device=settings.device,
        max_batch_size=settings.max_batch_size,
        kv_peer=encode_rank(transceiver.describe()),
        kv_endpoint=transceiver.endpoint,
        kernel=loaded.computer.kernel_name,
        load_s=load_s,
    )


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
