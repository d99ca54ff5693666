"""Counts compilations: graphs by torch.compile, and kernels of this project by Triton."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from torch._dynamo.utils import counters


@contextmanager
def count_compilations() -> Iterator[Callable[[], dict[str, int]]]:
    """Yields a function that returns how many "graphs" and "kernels" were compiled since its last call.

    Kernels that PyTorch generates inside a graph are not counted separately. A kernel loaded from a cache on
    disk is counted: Triton specialized it anew.
    """
    kernels = 0

    def note(**what) -> None:
        nonlocal kernels
        kernels += 1
        if earlier is not None:
            earlier(**what)

    def so_far() -> dict[str, int]:
        return {"graphs": counters["stats"]["unique_graphs"], "kernels": kernels}

    told = so_far()

    def since() -> dict[str, int]:
        nonlocal told
        before, told = told, so_far()
        return {what: count - before[what] for what, count in told.items()}

    if find_spec("triton") is None:
        yield since
        return
    from triton import knobs

    earlier, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, note
    try:
        yield since
    finally:
        knobs.runtime.jit_post_compile_hook = earlier
