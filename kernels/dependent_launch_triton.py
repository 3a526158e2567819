"""Programmatic dependent launch: a kernel's programs start while the kernel before it ends.

Every kernel of a chain waits for the one before it (`follow` or `wait`) before it reads or writes what another one
touches, in every program: so the end of a kernel implies the end of all before it. Weights, which nobody writes, may
be loaded earlier.

Small kernels let the next one start at once. One that fills the device does so when it has read its inputs: programs
that wait take room from its own.
"""

import triton
import triton.language as tl


@triton.jit
def follow(PDL: tl.constexpr):
    """Lets the next kernel start, and waits for the last one to end."""
    release(PDL)
    wait(PDL)


@triton.jit
def wait(PDL: tl.constexpr):
    """For the last kernel to end."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Lets the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
