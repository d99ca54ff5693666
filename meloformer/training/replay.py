"""Many small kernels as one launch: work of fixed shapes on a GPU, recorded as CUDA graphs.

What a batch is read for (`MeloFormer.read`) takes some 170 of them, which cost the host of a small model more
than their time on the GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.structure import Structure

_MOST = 64  # kinds of inputs that are recorded


class Replayed:
    """A function of token ids and their structure on a GPU, whose kernels are recorded at the second call
    with inputs of one kind, and from then on replayed.

    The first call of a kind runs it as it is: kernels are loaded then, and constants copied. Results are
    copies, which nothing overwrites.

    Args:
        function: of ids and a `Structure` to tensors, or tuples of them and None, nested. It must not wait
            for the device, nor depend on anything but the inputs and `kind`.
    """

    def __init__(self, function: Callable[[Tensor, Structure], Any]):
        self._function = function
        self._recorded: dict[tuple, _Graph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()  # graphs of one stream can share memory in between

    def __call__(self, ids: Tensor, structure: Structure, kind: object = None):
        """On the current stream, which must not be the default one, and be the same at every call.

        Args:
            kind: what else decides which kernels run.
        """
        key = kind, ids.shape, structure.summary_doc.shape
        if key not in self._recorded:
            if len(self._recorded) < _MOST:
                self._recorded[key] = None
            return self._function(ids, structure)
        if self._recorded[key] is None:
            self._recorded[key] = _Graph(self._function, ids, structure, self._pool)
        return self._recorded[key].replay(ids, structure)


class _Graph:
    def __init__(self, function: Callable, ids: Tensor, structure: Structure, pool):
        self._ids, facts = ids.clone(), {name: x.clone() for name, x in _facts(structure).items()}
        self._structure = replace(structure, **facts)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread pins memory meanwhile, which must not end the recording.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self._results = function(self._ids, self._structure)
        finally:
            self._graph.capture_end()

    def replay(self, ids: Tensor, structure: Structure):
        self._ids.copy_(ids)
        torch._foreach_copy_([*_facts(self._structure).values()], [*_facts(structure).values()])
        self._graph.replay()
        return _copied(self._results)


def _facts(structure: Structure) -> dict[str, Tensor]:
    return {name: x for name, x in vars(structure).items() if isinstance(x, Tensor)}


def _copied(results):
    if not isinstance(results, tuple):
        return results if results is None else results.clone()
    copies = map(_copied, results)
    return type(results)(*copies) if hasattr(results, "_fields") else tuple(copies)
