"""Programmatic dependent launch: a kernel's programs start while the kernel before it ends.

Every kernel of a chain calls `follow` before it reads or writes what another one touches, in every program: so the end
of a kernel implies the end of all before it. Weights, which nobody writes, may be loaded earlier.
"""

import triton
import triton.language as tl


@triton.jit
def follow(PDL: tl.constexpr):
    """Lets the next kernel start, and waits for the last one to end."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
