"""The public interface of the attention: argument checks and the choice of a backend, no kernels.

A backend is a module of this package that defines

- `unavailable(device) -> str | None`: why it cannot run on that device, None if it can;
- `Backend`, a class that follows the protocol below.

To add a backend, write its module and register it in `BACKENDS`; `PREFERRED` decides what 'auto' means.
Modules are imported on first use, so that the dependencies of one backend are needed by no other.
"""

import warnings
from importlib import import_module
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from .structure import Structure

BACKENDS: dict[str, str] = {
    "reference": ".reference",
    "flex": ".flex",
    "triton": ".triton_backend",
}

PREFERRED: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "flex", "reference")
}  # by device type, best first
PREFERRED_ELSEWHERE = ("reference",)


class Backend(Protocol):
    """The attention of one batch. What depends on the structure alone is computed once, on creation.

    It may have a method `finalize` and a flag `any_summaries`, see `Attention`. The other methods get
    arguments that `Attention` has checked: of one dtype and device. Logits are scaled by 1/sqrt(D). A query
    that is fully masked yields exactly 0 and passes no gradient.
    """

    def __init__(self, structure: Structure) -> None: ...

    def summarize(self, q_s: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> Tensor: ...

    def update(self, q_r: Tensor, k_r: Tensor, v_r: Tensor, k_s: Tensor, v_s: Tensor) -> Tensor: ...


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The name of the backend to use on `device`; 'auto' picks the best that can run there.

    Warns if 'auto' has to skip a better one.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run on the device.
    """
    device = torch.device(device)
    if name == "auto":
        for candidate in PREFERRED.get(device.type, PREFERRED_ELSEWHERE):
            reason = _module(candidate).unavailable(device)
            if reason is None:
                return candidate
            warnings.warn(f"attention backend '{candidate}' is left out: {reason}", stacklevel=2)
        raise RuntimeError(f"no attention backend can run on {device}")
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend '{name}': choose from auto, {', '.join(BACKENDS)}")
    reason = _module(name).unavailable(device)
    if reason is not None:
        raise RuntimeError(f"attention backend '{name}' cannot run on {device}: {reason}")
    return name


def make_attention(structure: Structure, backend: str = "auto") -> "Attention":
    """The attention of one batch, for all layers of a model. Errors are those of `resolve_backend`."""
    return Attention(structure, resolve_backend(backend, structure.device))


class Attention:
    """The two attention phases of one batch of B rows: M summary (s) and N regular (r) tokens.

    All arguments and results are [B, H, M or N, D], of one floating dtype, on the structure's device, in any
    strides; queries and keys are already rotated. Logits are scaled by 1/sqrt(D). Fully masked tokens
    (padding) get exactly 0 and pass no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """

    def __init__(self, structure: Structure, backend: str):
        self.structure = structure
        self.backend = backend
        self._implementation: Backend = _module(backend).Backend(structure)

    def summarize(self, q_s: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> Tensor:
        """Summaries attend to summaries (SS) and regular tokens (SR) in one softmax: [B, H, M, D]."""
        self._check(q_s, summaries=(q_s, k_s, v_s), tokens=(k_r, v_r))
        return self._implementation.summarize(q_s, k_s, v_s, k_r, v_r)

    def update(self, q_r: Tensor, k_r: Tensor, v_r: Tensor, k_s: Tensor, v_s: Tensor) -> Tensor:
        """Regular tokens attend to summaries (RS) and regular tokens (RR) in one softmax: [B, H, N, D].

        `k_s`, `v_s` are K2 and V2, projected from what `summarize` returned.
        """
        self._check(q_r, summaries=(k_s, v_s), tokens=(q_r, k_r, v_r))
        return self._implementation.update(q_r, k_r, v_r, k_s, v_s)

    @property
    def any_summaries(self) -> bool:
        """Whether a graph compiled with this attention serves any number M of summaries."""
        return getattr(self._implementation, "any_summaries", False)

    def finalize(self) -> "Attention":
        """Completes what creation started, if anything: call it before a compiled model takes this.

        On CUDA it may synchronize unless this was built ahead.
        """
        finalize = getattr(self._implementation, "finalize", None)
        if finalize is not None:
            finalize()
        return self

    def _check(self, query: Tensor, summaries: tuple[Tensor, ...], tokens: tuple[Tensor, ...]) -> None:
        if query.dim() != 4 or not query.is_floating_point():
            raise ValueError(f"expected floating [B, H, length, D], got {query.dtype} {list(query.shape)}")
        rows, num_summaries = self.structure.summary_doc.shape
        heads, head_dim = query.shape[1], query.shape[3]
        for tensors, length in ((summaries, num_summaries), (tokens, self.structure.doc.shape[1])):
            for x in tensors:
                if x.shape != (rows, heads, length, head_dim):
                    raise ValueError(
                        f"expected [B, H, length, D] = {[rows, heads, length, head_dim]} "
                        f"for this structure, got {list(x.shape)}"
                    )
                if x.dtype != query.dtype:
                    raise ValueError(f"q, k and v must share one dtype, got {query.dtype} and {x.dtype}")
                if x.device != self.structure.device:
                    raise ValueError(f"the structure is on {self.structure.device}, a tensor on {x.device}")


def _module(backend: str) -> ModuleType:
    return import_module(BACKENDS[backend], __package__)
