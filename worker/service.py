"""One worker as its HTTP handlers see it: the model's text side, the engine, and which state it is in."""

import asyncio
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych import __version__, block_hash
from diptych.config import LlmConfig, resolve_limits
from diptych.errors import ModelNotFound, Overloaded, Unavailable
from diptych.model_source import resolve_model
from diptych.text import Tokenizer
from diptych.trust import ClusterTrust
from diptych.wire import EngineProgress, EngineReady, EngineStats, Role, WorkerState
from diptych.worker.engine_client import EngineClient
from diptych.worker.handed_out import HandedOut
from diptych.worker.hardware import detect
from diptych.worker.kv_events import KvEventFeed, TrtBuffer
from diptych.worker.metrics import WorkerMetrics
from diptych.worker.settings import engine_settings

log = logging.getLogger(__name__)

_PERF_RING = 1000
_ITERATION_RING = 1000
_NEWEST = 0.1  # weight of the newest request in the usual duration
_QUIET_S = 0.3  # the engine's statistics may be 0.1 s old


class WorkerService:
    def __init__(self, config: LlmConfig) -> None:
        self.config = config
        self.incarnation = secrets.token_hex(8)
        self.worker_id = f"{socket.gethostname()}:{config.port}-{self.incarnation[:6]}"
        self.role: Role = config.server_role
        self.state: WorkerState = "STARTING"
        self.changed = asyncio.Event()  # set with every change of `role` and `state`
        self.stopping = asyncio.Event()
        self.trust = ClusterTrust(config.cluster_secret)
        self.created = int(time.time())
        self.metrics = WorkerMetrics(config.model_name, self._stats, lambda: self._ready)
        self.perf: deque[dict[str, Any]] = deque(maxlen=config.perf_metrics_max_requests or _PERF_RING)
        self.iterations: deque[dict[str, Any]] = deque(maxlen=_ITERATION_RING)
        self.open_requests = 0
        self._max_batch_size = 0
        self._usual_s = 1.0  # how long a request takes
        self.handed_out = HandedOut()
        self._engine: EngineClient | None = None
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_path: Path | None = None
        self._kv_events: KvEventFeed | None = None
        self._progress_shown = ""

    async def start(self) -> None:
        """Load tokenizer and engine side by side. StartupError says why that failed."""
        hardware = detect(self.config)
        limits = resolve_limits(self.config, hardware)
        log.info("%s: %s", self.config.model_name, limits)
        self._max_batch_size = limits.max_batch_size
        path = await asyncio.to_thread(resolve_model, self.config.model, self.config.revision)
        self._engine = EngineClient(
            engine_settings(
                self.config, path, hardware, incarnation=self.incarnation, secret=self.trust.secret
            ),
            hang_timeout_s=self.config.hang_timeout_s,
        )
        self._engine.on_iteration = self._keep_iteration
        tokenizer_path = path
        if self.config.tokenizer is not None:
            tokenizer_path = await asyncio.to_thread(resolve_model, self.config.tokenizer, None)
        tokenizer, ready = await asyncio.gather(
            asyncio.to_thread(_load_tokenizer, tokenizer_path), self._engine.start(self._show)
        )
        self._tokenizer, self._tokenizer_path = tokenizer, tokenizer_path
        self._kv_events = self._feed(ready)
        self.state = "READY"
        log.info(
            "ready in %.1f s: %s on %s kernels, %d KV blocks of %d tokens, max_seq_len %d",
            ready.load_s,
            self.config.model_name,
            ready.kernel,
            ready.num_blocks,
            self.config.kv_cache_config.tokens_per_block,
            ready.max_seq_len,
        )

    def change_role(self, role: Role) -> None:
        """Which legs routers give us from now on; those that run end here."""
        if role != self.role:
            log.info("role %s becomes %s: %d open requests", self.role, role, self.open_requests)
            self.role = role
            self.changed.set()

    def request_drain(self, reason: str) -> None:
        """Take nothing new from now on, and end when what runs has ended."""
        if not self.stopping.is_set():
            log.info("draining (%s): %d open requests", reason, self.open_requests)
            self.stopping.set()
            self._enter("DRAINING")

    async def drain(self) -> None:
        """Wait, but not for ever, until nothing runs and no peer needs our blocks."""
        deadline = time.monotonic() + self.config.drain_timeout_s
        quiet_since: float | None = None
        while self.engine.is_alive:
            now = time.monotonic()
            if self.open_requests or self.engine.stats.leased_blocks:
                quiet_since = None
            elif quiet_since is None:
                quiet_since = now
            elif now - quiet_since >= _QUIET_S:
                return
            if now >= deadline:
                log.warning(
                    "drain_timeout_s (%g s) is over: %d requests and %d held blocks are given up",
                    self.config.drain_timeout_s,
                    self.open_requests,
                    self.engine.stats.leased_blocks,
                )
                return
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()

    @property
    def engine(self) -> EngineClient:
        assert self._engine is not None
        return self._engine

    @property
    def ready(self) -> EngineReady:
        ready = self.engine.ready
        assert ready is not None
        return ready

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def kv_events(self) -> KvEventFeed:
        assert self._kv_events is not None
        return self._kv_events

    @property
    def model_names(self) -> list[str]:
        """The name that we print first, then the others that requests may use."""
        name = self.config.model_name
        return [name, *({self.config.model, Path(self.config.model).name} - {name})]

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names:
            raise ModelNotFound(
                f"model {name!r} is not served here; available: {self.config.model_name!r}", param="model"
            )

    def check_ready(self) -> None:
        if self.state == "STARTING":
            raise Unavailable("the model is still loading", retry_after_s=2)
        if self.state == "DRAINING":
            raise Unavailable("this worker is shutting down", retry_after_s=1)
        if not self.engine.is_alive:
            raise Unavailable("the engine process has ended", code="worker_lost", retry_after_s=5)
        self.check_responsive()

    def check_responsive(self) -> None:
        """An engine that hangs answers nobody: what can go elsewhere should."""
        silent_s = 0.0 if self._engine is None else self._engine.silent_s
        if silent_s >= self.config.stall_timeout_s:
            raise Unavailable(
                f"the engine has not answered for {silent_s:.0f} s", code="engine_stalled", retry_after_s=5
            )

    @contextmanager
    def place(self, *, is_second_leg: bool) -> Iterator[None]:
        """A request's place here, if there is one. A second leg may wait in a longer line: half of it is done."""
        waiting = self.open_requests - self._max_batch_size
        if waiting >= self.config.max_queue_size * (2 if is_second_leg else 1):
            raise Overloaded(
                f"{waiting} requests wait here already",
                retry_after_s=waiting / self._max_batch_size * self._usual_s,
            )
        started = time.monotonic()
        self.open_requests += 1
        try:
            yield
            self._usual_s += _NEWEST * (time.monotonic() - started - self._usual_s)
        finally:
            self.open_requests -= 1

    @property
    def is_loaded(self) -> bool:
        return self._ready is not None

    @property
    def load(self) -> dict[str, float]:
        """What the registry tells of us."""
        stats = self._stats()
        free = stats.free_blocks + stats.cached_blocks
        return {"running": stats.running, "waiting": stats.waiting + stats.fetching, "free_blocks": free}

    @property
    def layout(self) -> str:
        """The fingerprint of our KV layout; empty while the model loads."""
        return str(self._ready.layout["fingerprint"]) if self._ready else ""

    @property
    def _ready(self) -> EngineReady | None:
        return None if self._engine is None else self._engine.ready

    def server_info(self) -> dict[str, Any]:
        ready, stats = self._ready, self._stats()
        return {
            "worker_id": self.worker_id,
            "role": self.role,
            "model": self.config.model_name,
            "models": self.model_names,
            "incarnation": self.incarnation,
            "state": self.state,
            "layout": self.layout,
            "kv_endpoint": ready.kv_endpoint if ready else "",
            "kernel": ready.kernel if ready else "",
            "max_seq_len": ready.max_seq_len if ready else 0,
            "max_batch_size": self._max_batch_size,
            "tokens_per_block": self.config.kv_cache_config.tokens_per_block,
            "kv_cache_hash_algo": block_hash.ALGORITHM,
            "kv_links": [
                {
                    "peer": link.peer,
                    "transport": link.transport,
                    "copies": link.copies,
                    "gb_s": link.probed_gb_s,
                }
                for link in stats.links
            ],
            "load": {"running": stats.running + stats.fetching, "waiting": stats.waiting},
            "tokenizer_path": str(self._tokenizer_path or ""),
            "tokenizer_fingerprint": self._tokenizer.fingerprint if self._tokenizer is not None else "",
            "chat_template": self.config.chat_template,
            "version": __version__,
        }

    def _feed(self, ready: EngineReady) -> KvEventFeed:
        size = self.config.kv_cache_config.event_buffer_max_size
        buffer = None
        if size:
            buffer = TrtBuffer(size, window_size=ready.max_seq_len, num_blocks=ready.num_blocks)
        return KvEventFeed(self.engine, self.incarnation, buffer)

    def _enter(self, state: WorkerState) -> None:
        self.state = state
        self.changed.set()

    def _stats(self) -> EngineStats:
        return EngineStats() if self._engine is None else self._engine.stats

    def _keep_iteration(self, stats: EngineStats) -> None:
        assert stats.iteration is not None
        self.iterations.append(stats.iteration)

    def _show(self, progress: EngineProgress) -> None:
        text = progress.message
        if progress.fraction is not None:
            text += f" {int(progress.fraction * 4) * 25} %"
        if text != self._progress_shown:
            self._progress_shown = text
            log.info("%s", text)


def _load_tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    log.debug("tokenizer %s", tokenizer.fingerprint)  # computed here, on a thread: it takes a while
    return tokenizer
