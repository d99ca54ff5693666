"""Launches that skip what Triton found out at an earlier one.

Triton inspects the type and the alignment of every argument at every launch, which takes some 0.1 ms for
kernels of many arguments, longer than some of them run. A launch whose numbers were all seen before, with
pointers aligned as then, takes the kernel that was compiled then and passes addresses.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

_MAX_KNOWN = 1024  # launches remembered for one kernel
_ALIGNED = 16  # bytes


def _compiled(kernel) -> bool:
    """Whether `kernel` runs on a GPU, and not in Triton's interpreter."""
    return isinstance(kernel, triton.JITFunction)


def _current_stream(device: int) -> int:
    """Its address, as Triton asks for it: PyTorch's own way makes an object each time."""
    return triton.runtime.driver.active.get_current_stream(device)


class Launcher:
    """A Triton kernel whose parameters are tensors first, then numbers or tuples of them, then constants."""

    def __init__(self, kernel: triton.JITFunction):
        self._kernel = kernel
        self._constants = (
            frozenset(p.name for p in kernel.params if p.is_constexpr) if _compiled(kernel) else ()
        )
        self._known: dict[tuple, object] = {}

    def __call__(
        self,
        programs: Sequence[int],
        tensors: Sequence[Tensor],
        numbers: Sequence[float | tuple],
        **constants,
    ) -> None:
        """Launches the kernel on the tensors' device.

        Args:
            programs: the grid, of up to three dimensions.
            tensors: their dtypes must follow from that of the first, which alone is looked at.
            numbers: in the order of the kernel's parameters; a tuple, say of strides, is one parameter.
            constants: in the order of the kernel's parameters, then options of the compiler (num_warps,
                maxnreg).
        """
        first = tensors[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # Triton launches on the current one
                self(programs, tensors, numbers, **constants)
            return
        pointers = [x.data_ptr() for x in tensors]
        misaligned = 0
        for pointer in pointers:
            misaligned |= pointer
        key = (first.device, first.dtype, tuple(numbers), tuple(constants.values()))
        known = None if misaligned % _ALIGNED else self._known.get(key)
        if known is None:
            known = self._kernel[tuple(programs)](*tensors, *numbers, **constants)
            if known is None or misaligned % _ALIGNED:  # interpreted, or not the usual case
                return
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = known
            return
        x, y, z = (*programs, 1, 1)[:3]
        values = [value for name, value in constants.items() if name in self._constants]
        stream = _current_stream(first.device.index)
        known.run(
            x, y, z, stream, known.function, known.packed_metadata, None, None, None,
            *pointers, *numbers, *values,
        )  # fmt: skip
