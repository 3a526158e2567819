"""What is installed here, found without importing it."""

import platform
from collections.abc import Iterator
from importlib import metadata

from diptych.transceiver.doctor.finding import Finding

_WORKER = "pip install 'diptych[worker]'"
_NEEDED = ("torch", "safetensors", "gguf", "xxhash")
# Distributions of which one is enough, and what they are for.
_OPTIONAL: tuple[tuple[tuple[str, ...], str], ...] = (
    (("flashinfer-python",), "fast attention on GPUs: pip install 'diptych[cuda]'"),
    (("triton",), "kernels for GPUs: pip install 'diptych[cuda]'"),
    (("nixl-cu13", "nixl-cu12"), "RDMA between machines: pip install nixl-cu13"),
    (("ucxx-cu13", "ucxx-cu12"), "the UCX backend: pip install ucxx-cu13"),
)


def versions() -> Iterator[Finding]:
    yield Finding(section="versions", name="python", detail=platform.python_version())
    yield Finding(
        section="versions", name="diptych", detail=_version("diptych") or "a source tree, not installed"
    )
    for name in _NEEDED:
        found = _version(name)
        yield Finding(
            section="versions",
            name=name,
            status="ok" if found else "fails",
            detail=found or "not installed",
            remedy="" if found else _WORKER,
        )
    for names, purpose in _OPTIONAL:
        found = next(filter(None, map(_version, names)), None)
        yield Finding(
            section="versions",
            name=names[0].partition("-")[0],
            status="ok" if found else "none",
            detail=found or f"not installed; {purpose}",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
