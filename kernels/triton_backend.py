"""The Triton backend: block-sparse attention over a plan made once per batch.

`plan`, `ops` and what they use import triton. They are imported on first use, so that `unavailable` works
without it.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from .structure import Structure

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton 3.4 to 3.7.0 miscompile a product on Hopper whose first operand is the transpose of an accumulator:
# the kernels have none, which the tests check. Older versions lack what the kernels are written in.
OLDEST_TRITON = (3, 5)
OLDEST_GPU = (8, 0)  # whose matrix units multiply bfloat16


def has_float8(device: torch.device) -> bool:
    """Whether instructions there convert numbers of 8 bits (float8_e4m3fn)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def unavailable(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    found = _triton_version()
    if found < OLDEST_TRITON:
        oldest, found = (".".join(map(str, number)) for number in (OLDEST_TRITON, found))
        return f"triton {found} is too old, it takes {oldest} or newer"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # slow, for tests
    if device.type != "cuda":
        return "it runs on cuda (and, slowly, on cpu if TRITON_INTERPRET=1 is set before triton is imported)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.hip is not None:
        return "it is for GPUs of NVIDIA, and this PyTorch is for those of AMD"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_GPU:
        oldest, found = (".".join(map(str, number)) for number in (OLDEST_GPU, found))
        return f"the GPU has compute capability {found}, it takes {oldest} or newer"
    return None


def _triton_version() -> tuple[int, ...]:
    """Major and minor; that of a build without metadata is not judged."""
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return OLDEST_TRITON


class Backend:
    """See `attention.Backend`.

    Raises:
        ValueError: D is not in `HEAD_DIMS`, or the dtype is not in `DTYPES`.
        RuntimeError: in a backward with create_graph.
    """

    any_summaries = True

    def __init__(self, structure: Structure):
        from . import ops  # noqa: F401, registers the operators
        from .plan import Plan, on_device
        from .summarize import find_bars

        self.structure, self.plan = structure, Plan(structure)
        with on_device(structure.device):
            self.bars = find_bars(structure)

    def finalize(self) -> None:
        self.plan.finalize()
        for tensor in (self.bars[0], self.structure.summary_doc):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)

    def summarize(self, q_s: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> Tensor:
        _check(q_s)
        return torch.ops.meloformer.summarize(q_s, k_s, v_s, k_r, v_r, *self.bars)[0]

    def update(self, q_r: Tensor, k_r: Tensor, v_r: Tensor, k_s: Tensor, v_s: Tensor) -> Tensor:
        _check(q_r)
        return torch.ops.meloformer.update(q_r, k_s, v_s, k_r, v_r, *self.plan.finalize().tensors)[0]


def _check(q: Tensor) -> None:
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"attention 'triton' takes {HEAD_DIMS} channels per head, got {q.shape[-1]}")
    if q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"attention 'triton' computes in {names}, got {q.dtype}")
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: take float32 or float16 on a CPU")
