"""Launches that skip what Triton found out at an earlier one.

Triton inspects the type and the alignment of every argument at every launch, which takes some 0.1 ms for
kernels of many arguments, longer than some of them run. A launch whose numbers were all seen before, with
pointers aligned as then, takes the kernel that was compiled then and passes addresses.

How a compiled kernel is called is private to Triton. So what Triton's own launcher passes is recorded once
for every kernel in a process, and a kernel that would be called otherwise here is left to Triton, with a
warning. On AMD all are: there, Triton also tells tensors of 2 GB and more apart, which the key does not.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from threading import Lock, get_ident

import torch
import triton
from torch import Tensor

# Of what a compiled kernel is called with: metadata, and two hooks.
_FOR_PROFILERS = slice(6, 9)
_MAX_KNOWN = 1024  # launches remembered for one kernel
_ALIGNED = 16  # bytes
_ON_AMD = torch.version.hip is not None
_recording = Lock()


def _compiled(kernel) -> bool:
    """Whether `kernel` runs on a GPU, and not in Triton's interpreter."""
    return isinstance(kernel, triton.JITFunction)


def current_stream(device: int) -> int:
    """Its address, as Triton asks for it: PyTorch's own way makes an object each time."""
    return triton.runtime.driver.active.get_current_stream(device)


def _passed_by_triton(compiled, launch: Callable[[], object]) -> list | None:
    """The arguments that `launch` calls `compiled` with, which is not run; None if none are seen."""
    if not hasattr(compiled, "_run"):
        return None
    with _recording:  # of two threads, the second would put back what the first one had put there
        calls, own, me = [], compiled.run, get_ident()

        def record(*arguments):
            if get_ident() != me:
                return own(*arguments)
            calls.append(list(arguments))

        compiled._run = record
        try:
            launch()
        finally:
            compiled._run = own
    return calls[0] if len(calls) == 1 else None


def _same_call(ours: list, theirs: list | None) -> bool:
    """Whether two calls of a compiled kernel do the same, but for profilers, which get nothing from us."""
    if theirs is None or len(ours) != len(theirs):
        return False
    theirs = [x.data_ptr() if isinstance(x, Tensor) else x for x in theirs]
    pairs = [*zip(ours, theirs)]
    return all(our == their for our, their in pairs[: _FOR_PROFILERS.start] + pairs[_FOR_PROFILERS.stop :])


@cache
def _warn_of_another_call(version: str) -> None:
    warnings.warn(
        f"Triton {version} calls its kernels in a way unknown here: each launch costs the host longer",
        stacklevel=3,
    )


class Launcher:
    """A Triton kernel whose parameters are tensors first, then numbers or tuples of them, then constants."""

    def __init__(self, kernel: triton.JITFunction):
        self._kernel = kernel
        self._constants = (
            frozenset(p.name for p in kernel.params if p.is_constexpr) if _compiled(kernel) else ()
        )
        self._known: dict[tuple, object] = {}
        self._trusted: bool | None = False if _ON_AMD else None  # None: not compared with Triton yet

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
        constants["enable_fp_fusion"] = True  # Triton 3.10 is to round after every multiplication by default
        if self._trusted is False:
            self._kernel[tuple(programs)](*tensors, *numbers, **constants)
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
            if self._trusted is None:
                launch = partial(self._kernel[tuple(programs)], *tensors, *numbers, **constants)
                try:
                    call = self._call(known, programs, first, pointers, numbers, constants)
                    self._trusted = _same_call(call, _passed_by_triton(known, launch))
                except AttributeError:  # of what is private to Triton
                    self._trusted = False
                if not self._trusted:
                    _warn_of_another_call(triton.__version__)
                    return
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = known
            return
        known.run(*self._call(known, programs, first, pointers, numbers, constants))

    def _call(self, compiled, programs, first: Tensor, pointers: list[int], numbers, constants: dict) -> list:
        """What the compiled kernel is called with."""
        values = [value for name, value in constants.items() if name in self._constants]
        stream = current_stream(first.device.index)
        grid = (*programs, 1, 1)[:3]
        return [
            *(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None),
            *(*pointers, *numbers, *values),
        ]
