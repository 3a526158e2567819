"""The door to the nixl package: one agent, the memory it may read into and from, and reads.

Calls take each other's turn inside of nixl, and give up the GIL. Makes no progress by itself: whoever waits
calls `progress` or looks at a read. Knows nothing of peers' connections, plans or blocks.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
import numpy as np

from diptych.errors import StartupError, TransferError
from diptych.transceiver.packages import load_package
from diptych.transceiver.spans import Int64s


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Where bytes are, as nixl takes it. `kind`: DRAM or VRAM; `device`: of VRAM, as its process counts."""

    kind: str
    address: int
    num_bytes: int
    device: int = 0


class AgentCard(msgspec.Struct, frozen=True, kw_only=True):
    """What others must know of an agent to read its pool."""

    name: str
    metadata: bytes
    pool: Memory


class RunningRead:
    """It can be given up, not recalled: only when `is_done`, or when it has failed, is its
    destination safe.
    """

    def __init__(self, agent: "NixlAgent", handle: Any) -> None:
        self._agent = agent
        self._handle = handle

    def is_done(self) -> bool:
        """Raises TransferError when it has failed."""
        with self._agent.errors():
            state = self._agent.library.check_xfer_state(self._handle)
        if state == "ERR":
            raise TransferError("nixl could not read the owner's memory", code="peer_gone")
        return bool(state == "DONE")

    def release(self) -> None:
        with contextlib.suppress(TransferError), self._agent.errors():
            self._handle.release()
        self._handle = None  # it would keep nixl's agent alive


class NixlAgent:
    """TransferError: nixl says no. ConnectionError: it was closed."""

    def __init__(self, name: str, entered: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """`entered`: what every call needs around it, on whatever thread."""
        self._entered = entered
        api = load_package("nixl", "_api")
        self._failures = _failures(api.nixlBind)
        # Its progress thread would take a core, also while there is nothing to do.
        config = api.nixl_agent_config(
            enable_prog_thread=False,
            backends=["UCX"],
            sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        self.name = name
        try:
            # A process that ended by an exception with an agent alive would crash: this lets go of it at exit.
            with entered():
                self._alive: list[Any] = [api.nixl_agent(name, config)]
            weakref.finalize(self, self._alive.clear)
        except self._failures as error:
            raise StartupError(f"KV transport nixl does not start: {type(error).__name__} {error}") from error

    @property
    def library(self) -> Any:
        """nixl's own agent."""
        if not self._alive:
            raise ConnectionError("the transport was closed")
        return self._alive[0]

    def close(self) -> None:
        """It goes when the last read of it was released, and with it what such a read still does."""
        self._alive.clear()

    def register(self, memory: Memory) -> Any:
        """What `deregister` takes."""
        with self.errors():
            return self.library.register_memory(
                [(memory.address, memory.num_bytes, memory.device, "")], memory.kind
            )

    def deregister(self, registered: Any) -> None:
        with self.errors():
            self.library.deregister_memory(registered)

    def card(self, pool: Memory) -> AgentCard:
        with self.errors():
            metadata = bytes(self.library.get_agent_metadata())
        return AgentCard(name=self.name, metadata=metadata, pool=pool)

    def add(self, card: AgentCard) -> None:
        with self.errors():
            self.library.add_remote_agent(card.metadata)

    def remove(self, card: AgentCard) -> None:
        with contextlib.suppress(TransferError), self.errors():
            self.library.remove_remote_agent(card.name)

    def read(
        self, card: AgentCard, source: Int64s, here: Memory, destination: Int64s, length: Int64s
    ) -> RunningRead:
        """Start to copy spans of the card's pool (offsets) into ours."""
        with self.errors():
            local = self.library.get_xfer_descs(_descriptors(here, destination, length), here.kind)
            remote = self.library.get_xfer_descs(_descriptors(card.pool, source, length), card.pool.kind)
            handle = self.library.initialize_xfer("READ", local, remote, card.name)
            self.library.transfer(handle)
        return RunningRead(self, handle)

    def progress(self) -> None:
        with self.errors():
            self.library.get_new_notifs()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            with self._entered():
                yield
        except self._failures as error:
            raise TransferError(f"nixl says {type(error).__name__}: {error}", code="peer_gone") from error


def _descriptors(memory: Memory, offset: Int64s, length: Int64s) -> np.ndarray:
    """`[n, 3]` uint64: address, bytes, device."""
    rows = np.empty((len(offset), 3), np.uint64)
    rows[:, 0] = memory.address + offset
    rows[:, 1] = length
    rows[:, 2] = memory.device
    return rows


def _failures(bindings: Any) -> tuple[type[Exception], ...]:
    """nixl's exceptions have no ancestor of their own; RuntimeError is for what it cannot load."""
    found = (getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))
    return (RuntimeError, *(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception)))
