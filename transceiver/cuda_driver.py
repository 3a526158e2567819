"""The few calls of the CUDA driver that torch does not offer: plain allocations and handles that processes share.

Bound to the context that torch uses on one device; any thread may call. Knows nothing of pools.
"""

import ctypes
from contextlib import AbstractContextManager

import torch

HANDLE_BYTES = 64

_LAZY_PEER_ACCESS = 1
_u64, _pointer, _size = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t
# What every copy calls: with its types known, a call takes half the time.
_TYPES = {
    "cuMemcpyHtoDAsync_v2": (_u64, _pointer, _size, _pointer),
    "cuMemcpyDtoHAsync_v2": (_pointer, _u64, _size, _pointer),
    "cuMemcpyDtoDAsync_v2": (_u64, _u64, _size, _pointer),
}


class DriverError(Exception):
    """A call of the CUDA driver failed. `name` is the driver's: CUDA_ERROR_OUT_OF_MEMORY, for example."""

    def __init__(self, call: str, name: str) -> None:
        super().__init__(f"{call} failed with {name}")
        self.name = name


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class CudaDriver:
    def __init__(self, device: torch.device) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.c_void_p, _Handle, ctypes.c_uint]
        for name, types in _TYPES.items():
            getattr(self._library, name).argtypes = types
        torch.zeros(1, device=device)  # makes the context
        self._context = ctypes.c_void_p()
        self._current = _Current(self)
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            self._call("cuCtxGetCurrent", ctypes.byref(self._context))

    def allocate(self, num_bytes: int) -> int:
        """An allocation of its own: sharing its handle shares nothing else."""
        pointer = ctypes.c_uint64()
        with self.current():
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        return pointer.value

    def free(self, pointer: int) -> None:
        with self.current():
            self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def export(self, pointer: int) -> bytes:
        """A handle for other processes to the allocation that starts here."""
        handle = _Handle()
        with self.current():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(pointer))
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Where another process's allocation is in this one; its GPU need not be visible here."""
        pointer = ctypes.c_uint64()
        value = _Handle.from_buffer_copy(handle)
        with self.current():
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), value, _LAZY_PEER_ACCESS)
        return pointer.value

    def close(self, pointer: int) -> None:
        with self.current():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))

    def upload(self, device: int, host: int, num_bytes: int, stream: int) -> None:
        """Queue a copy from pinned memory."""
        self._call("cuMemcpyHtoDAsync_v2", device, host, num_bytes, stream)

    def download(self, host: int, device: int, num_bytes: int, stream: int) -> None:
        """Queue a copy to pinned memory."""
        self._call("cuMemcpyDtoHAsync_v2", host, device, num_bytes, stream)

    def copy(self, destination: int, source: int, num_bytes: int, stream: int) -> None:
        """Queue a copy between memories of GPUs, by the copy engines."""
        self._call("cuMemcpyDtoDAsync_v2", destination, source, num_bytes, stream)

    def current(self) -> AbstractContextManager[None]:
        """What is queued needs the context; the other calls take it themselves."""
        return self._current

    def push(self) -> None:
        self._call("cuCtxPushCurrent_v2", self._context)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(name, (text.value or b"an unknown error").decode())


class _Current(AbstractContextManager[None]):
    """Any number of threads may be in it at a time."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver

    def __enter__(self) -> None:
        self._driver.push()

    def __exit__(self, *exception: object) -> None:
        self._driver.pop()
