"""How a process of this host finds another's pool file: its descriptor under /proc, checked before it is trusted.

Needs the same boot of the same host, the same pid namespace and the right to open the owner's descriptor; what
decides is the header of the memory itself.
"""

import os

import msgspec

from diptych.errors import TransferError
from diptych.transceiver.pool import KvPool
from diptych.transceiver.pool_memory import MEMFD_NAME, PoolIdentity, PoolView, open_pool
from diptych.transceiver.transport import Unreachable


class HostRegion(msgspec.Struct, frozen=True, kw_only=True):
    identity: PoolIdentity
    boot_id: str
    pid_namespace: str
    pid: int
    fd: int

    @classmethod
    def of(cls, memory: KvPool) -> "HostRegion":
        return cls(
            identity=memory.identity,
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            fd=memory.fd,
        )

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, descriptor: bytes) -> "HostRegion":
        try:
            return msgspec.msgpack.decode(descriptor, type=cls)
        except msgspec.MsgspecError as error:
            raise TransferError(f"the owner's region cannot be read: {error}", code="layout") from error

    def open(self) -> PoolView:
        """Map the file read-only. Raises Unreachable, or TransferError when it is not the pool it was."""
        if self.boot_id != _boot_id():
            raise Unreachable("it is on another host")
        if self.pid_namespace != _pid_namespace():
            raise Unreachable(
                "it is on the same host in another pid namespace",
                remedy="let the two containers share one (docker: --pid=container:NAME or --pid=host; "
                'compose: pid: "service:NAME"; kubernetes: shareProcessNamespace)',
            )
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            # Looked at before it is opened: opening somebody else's device or pipe could have effects.
            if not os.readlink(path).startswith(f"/memfd:{MEMFD_NAME}"):
                raise TransferError(f"{path} is not a KV pool", code="peer_gone")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError as error:
            raise Unreachable(
                f"it is on the same host, but {path} may not be opened: {error.strerror}",
                remedy="run both workers as the same user with the same capabilities",
            ) from error
        except OSError as error:
            raise Unreachable(f"process {self.pid} is gone") from error
        try:
            return open_pool(fd, self.identity)
        finally:
            os.close(fd)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
