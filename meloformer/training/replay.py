"""Many small kernels as one launch: work of fixed shapes on a GPU, recorded as CUDA graphs.

What a batch is read for (`MeloFormer.read`) takes more than a hundred of them, which cost the host of a small
model more than their time on the GPU.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.structure import Structure

_MOST = 16  # kinds of inputs that are recorded: each keeps some 400 bytes a token


class Replayed:
    """Calls a function of token ids and their structure on a GPU; records its kernels at the second call with
    inputs of one kind, and from then on replays them.

    The first call of a kind runs it as it is: kernels are loaded then, and constants copied. Results are
    copies, which nothing overwrites. If memory does not suffice to record a kind, it runs as it is, with a
    warning; so does everything under deterministic algorithms, without one: those of PyTorch wait for the
    device. The function is passed at every call, since a caller that kept it here would keep itself.
    """

    def __init__(self):
        self._recorded: dict[tuple, _Graph | bool | None] = {}  # None: seen once; False: as it is
        self._pool = None

    def __call__(
        self, function: Callable[[Tensor, Structure], Any], ids: Tensor, structure: Structure, kind: object
    ):
        """On the current stream, which must not be the default one, and be the same at every call.

        Args:
            function: the same at every call, to tensors, or tuples of them and None, nested. It must not wait
                for the device, and which kernels run must depend on shapes and `kind` alone.
        """
        if torch.are_deterministic_algorithms_enabled():
            return function(ids, structure)
        key = kind, ids.shape, structure.summary_doc.shape
        graph = self._recorded.get(key, False)
        if graph is None:
            graph = self._recorded[key] = self._record(function, ids, structure)
        elif key not in self._recorded and len(self._recorded) < _MOST:
            self._recorded[key] = None
        return graph.replay(ids, structure) if graph else function(ids, structure)

    def _record(self, function: Callable, ids: Tensor, structure: Structure) -> "_Graph | bool":
        if self._pool is None:  # graphs of one stream can share what they need in between
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return _Graph(function, ids, structure, self._pool)
        except torch.OutOfMemoryError as error:  # a recording cannot use what PyTorch holds for others
            self._pool = None  # PyTorch takes no pool again that has lost its last graph
            reason = str(error).partition("\n")[0]
            text = f"some kernels are launched one by one, since recording them failed: {reason}"
            warnings.warn(text, stacklevel=3)
            return False


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
