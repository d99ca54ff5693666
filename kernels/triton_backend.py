"""The Triton backend: block-sparse attention over a plan made once per batch.

`visibility`, `plan`, `forward`, `backward` and `sparse` import triton and are imported when first
used, so that this module can tell why they cannot be.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from .structure import Structure
from .tiling import Tiles


def unavailable(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # slow, for tests
    if device.type != "cuda":
        return "it runs on cuda (and, slowly, on cpu if TRITON_INTERPRET=1 is set before triton is imported)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


class Backend:
    """See `attention.Backend`. `tiles` tells how to cut the work."""

    def __init__(self, structure: Structure, tiles: Tiles | None = None):
        from .plan import make_plan

        self.plan = make_plan(structure, tiles or Tiles())

    def summarize(self, q_s: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> Tensor:
        from .sparse import sparse_attention

        return sparse_attention(q_s, k_s, v_s, k_r, v_r, self.plan.summarize)

    def update(self, q_r: Tensor, k_r: Tensor, v_r: Tensor, k_s: Tensor, v_s: Tensor) -> Tensor:
        from .sparse import sparse_attention

        return sparse_attention(q_r, k_s, v_s, k_r, v_r, self.plan.update)
