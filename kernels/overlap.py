"""Launches that overlap: a kernel starts while the one before it in the stream ends.

This is programmatic dependent launch, on GPUs of NVIDIA of compute capability 9.0 or higher (CUDA C++
programming guide). A kernel launched so starts when each program of the one before has called
`let_next_start` or has ended. What that one writes is there once `wait_for_previous` returns, and it has
ended then; who was before it has ended if it has itself waited.

A kernel may read two kinds of things without waiting: what was there before the last kernel let it start,
if that one waited for it first; and what the last one itself wrote before its `let_next_read`. Both stay
true along a chain of kernels that let the next start without waiting, since each starts after the one before.

PTX promises what is written to who waits alone. The kernels here rely on more: that what the whole GPU could
see when a kernel was let start is what its programs read, and not what the cache of their multiprocessor kept
from earlier kernels. `tests/kernels/test_overlap.py` and `tests/generation/` try that on a GPU.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """Until the kernel before has ended."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr):
    """The next kernel may start when each program came here."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def let_next_read(OVERLAPS: tl.constexpr):
    """As `let_next_start`; what any thread of the program wrote before it is there for the next kernel."""
    if OVERLAPS:
        tl.debug_barrier()  # the first thread of a program to let the next start does so for all
        tl.inline_asm_elementwise(
            "fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    let_next_start(OVERLAPS)


def options(overlaps: int) -> dict[str, bool]:
    """Of the compiler, for a kernel that waits, if it is told that launches overlap."""
    return {"launch_pdl": True} if overlaps else {}


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether launches there can overlap; with Triton's interpreter none do."""
    compiled = isinstance(wait_for_previous, triton.JITFunction)
    nvidia = compiled and device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device)[0] >= 9
