"""Measures one column of the report on one row: errors first, then times, memory and pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common.timing import Timer
from benchmarks.songs.structures import (
    causal_pairs,
    cut,
    document_pairs,
    instrument_order,
    padded,
    reordered,
    visible_pairs,
)
from meloformer.kernels import Structure, make_attention, reference
from meloformer.kernels.attention import Attention
from meloformer.kernels.dense import CausalAttention

CHECKED_TOKENS = 4096
# Maximum error of the kernels, as a multiple of the error of `reference` in the same precision.
ALLOWED_ERROR = {"output": 2.0, "gradient": 3.0}
# FlexAttention is compiled for every length: rows beyond this one are padded to a multiple of it.
FLEX_LENGTH = 8192
SHORT_FLEX_LENGTH = 2048

BACKENDS = {
    "triton": "triton",
    "flex": "flex",
    "flex_sorted": "flex",
    "flex_fp32": "flex",
    "reference": "reference",
}
DENSE = {"dense_cudnn": SDPBackend.CUDNN_ATTENTION, "dense_flash": SDPBackend.FLASH_ATTENTION}
DOCUMENTS = {"documents_cudnn": "cudnn", "documents_flash": "flash"}  # ways of `CausalAttention`
COLUMNS = (*BACKENDS, *DENSE, *DOCUMENTS)
ANYWHERE = ("reference",)  # columns that need no CUDA device

Attend = Callable[..., Tensor]


class WrongResult(Exception):
    """The results of the code to be timed are wrong."""


@dataclass(frozen=True)
class Shape:
    """Shape and dtype of the tensors of all columns, [rows, heads, tokens, dim]."""

    heads: int = 8
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16


def measure(column: str, structure: Structure, shape: Shape, timer: Timer) -> dict:
    """The figures of one column on one row, as JSON values; docs/benchmarks.md lists the keys.

    Raises:
        WrongResult: a result is not finite, an error of `triton` exceeds `ALLOWED_ERROR`, or its plan does
            not cover exactly the visible pairs.
        Exception: whatever the column itself raises: out of memory, compilation failed, wrong device.
    """
    if column in DENSE:
        return _measure_dense(DENSE[column], structure, shape, timer)
    if column in DOCUMENTS:
        return _measure_documents(DOCUMENTS[column], structure, shape, timer)
    return _measure_sparse(column, structure, shape, timer)


def _measure_dense(backend: SDPBackend, structure: Structure, shape: Shape, timer: Timer) -> dict:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    def inputs_of(length: int) -> list[Tensor]:
        return _inputs([length] * 3, structure.device, shape, rows)

    rows, length = structure.doc.shape
    inputs = inputs_of(length)
    result = {"dtype": _name(shape.dtype), "first_call_s": timer.seconds(lambda: _both(attend, inputs))}
    result["computed_pairs"] = causal_pairs(structure)
    checked = inputs_of(min(length, CHECKED_TOKENS))
    result["errors"] = _errors("update", attend, _causal(checked[0]), checked)
    return result | {"update": _time(timer, attend, inputs)}


def _measure_documents(way: str, structure: Structure, shape: Shape, timer: Timer) -> dict:
    def of(structure: Structure) -> tuple[Attend, list[Tensor]]:
        rows, length = structure.doc.shape
        inputs = _inputs([length] * 3, structure.device, shape, rows)
        return CausalAttention(structure, way=way), inputs

    attend, inputs = of(structure)
    result = {"dtype": _name(shape.dtype), "first_call_s": timer.seconds(lambda: _both(attend, inputs))}
    result["computed_pairs"] = document_pairs(structure)
    head = cut(structure, CHECKED_TOKENS)
    checked, checked_inputs = of(head)
    result["errors"] = _errors("update", checked, _causal(checked_inputs[0], head.doc), checked_inputs)
    return result | {"update": _time(timer, attend, inputs)}


def _causal(q: Tensor, doc: Tensor | None = None) -> Attend:
    """Dense causal attention with the code of `reference`, for the length of `q`; `doc` [B, N] is the
    document of each token, if they do not all see each other."""
    positions = torch.arange(q.shape[2], device=q.device)

    def sees(queries: slice) -> Tensor:
        earlier = positions[None, queries, None] >= positions
        return earlier if doc is None else earlier & (doc[:, queries, None] == doc[:, None])

    chunks = reference.chunks(sees, q.shape[2])
    return lambda q, k, v: reference.attend(q, k, v, chunks)


def _measure_sparse(column: str, structure: Structure, shape: Shape, timer: Timer) -> dict:
    backend = BACKENDS[column]
    phases = ("update",) if backend == "flex" else ("summarize", "update")
    if column == "flex_fp32":
        shape = Shape(shape.heads, shape.dim, torch.float32)
    checked = _prepared(column, cut(structure, CHECKED_TOKENS))
    structure = _prepared(column, structure)
    inputs = {phase: phase_inputs(structure, phase, shape) for phase in phases}

    def first_call() -> None:
        attention = make_attention(structure, backend)
        for phase in phases:
            _both(getattr(attention, phase), inputs[phase])

    result: dict = {"dtype": _name(shape.dtype), "tokens": structure.doc.shape[1]}
    result["first_call_s"] = timer.seconds(first_call)
    result["errors"] = sparse_errors(checked, backend, phases, shape)
    if column == "triton":
        refuse_errors(result["errors"])
    attention = make_attention(structure, backend)
    result |= _pairs(attention, structure)
    result["plan"] = timer(lambda: make_attention(structure, backend))
    for phase in phases:
        result[phase] = _time(timer, getattr(attention, phase), inputs[phase])
    return result


def _prepared(column: str, structure: Structure) -> Structure:
    """The rows as the column needs them: padded for FlexAttention, and sorted for `flex_sorted`."""
    if BACKENDS[column] == "flex":
        length = structure.doc.shape[1]
        structure = padded(structure, FLEX_LENGTH if length > FLEX_LENGTH else SHORT_FLEX_LENGTH)
    if column == "flex_sorted":
        structure = reordered(structure, instrument_order(structure))
    return structure


def _pairs(attention: Attention, structure: Structure) -> dict[str, int]:
    """Number of pairs that the update phase computes, and bytes of the plan, where the backend knows."""
    implementation = attention._implementation
    if attention.backend == "triton":
        found = implementation.plan.statistics()
        visible = visible_pairs(structure)
        if found["visible"] != visible:
            raise WrongResult(f"the plan covers {found['visible']:,} pairs, but {visible:,} are visible")
        return {
            "computed_pairs": found["computed"],
            "full_pairs": found["full"],
            "plan_bytes": found["bytes"],
        }
    if attention.backend == "flex":
        block_mask = implementation._update._block_mask
        blocks = int(block_mask.kv_num_blocks.sum())
        if block_mask.full_kv_num_blocks is not None:
            blocks += int(block_mask.full_kv_num_blocks.sum())
        queries, keys = block_mask.BLOCK_SIZE
        return {"computed_pairs": blocks * queries * keys}
    return {}


def _inputs(lengths: list[int], device: torch.device, shape: Shape, rows: int = 1) -> list[Tensor]:
    """Random tensors [rows, H, length, D] with gradients, strided as in the model; last a cotangent."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(length: int) -> Tensor:
        x = torch.randn(rows, length, shape.heads, shape.dim, device=device, generator=generator)
        return x.to(shape.dtype).transpose(1, 2)

    return [*(draw(length).requires_grad_() for length in lengths), draw(lengths[0])]


def phase_inputs(structure: Structure, phase: str, shape: Shape) -> list[Tensor]:
    """Random arguments of one phase in its order, and a cotangent of its output."""
    rows, summaries = structure.summary_doc.shape
    own, other = summaries, structure.doc.shape[1]
    if phase == "update":
        own, other = other, own
    return _inputs([own, own, own, other, other], structure.device, shape, rows)


def _both(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """The output and all gradients."""
    *arguments, cotangent = inputs
    out = attend(*arguments)
    return [out.detach(), *torch.autograd.grad(out, arguments, cotangent)]


def _time(timer: Timer, attend: Attend, inputs: list[Tensor]) -> dict:
    """Times forward and backward separately. The forward is that of training, saving for the backward."""
    *arguments, cotangent = inputs

    # No graph is used twice: compiled attention frees its buffers in the backward.
    return {
        "forward": timer(lambda: attend(*arguments)),
        "backward": timer.after(
            lambda: attend(*arguments), lambda out: torch.autograd.grad(out, arguments, cotangent)
        ),
        "extra_mb": timer.extra_mb(lambda: _both(attend, inputs)),
    }


def sparse_errors(
    structure: Structure, backend: str, phases: tuple[str, ...], shape: Shape
) -> dict[str, float]:
    """Largest errors of a backend against float64: see `_errors`."""
    ours, dense = make_attention(structure, backend), make_attention(structure, "reference")
    found = {}
    for phase in phases:
        inputs = phase_inputs(structure, phase, shape)
        found |= _errors(phase, getattr(ours, phase), getattr(dense, phase), inputs)
    return found


def _errors(phase: str, ours: Attend, dense: Attend, inputs: list[Tensor]) -> dict[str, float]:
    """Largest error of each result against float64, as a multiple of the error of `dense` in the same dtype.

    One rounding of the largest value is added to the latter, since it can be zero.
    """
    exact, low, got = (
        _both(attend, [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs])
        for attend, dtype in ((dense, torch.float64), (dense, inputs[0].dtype), (ours, inputs[0].dtype))
    )
    names = ("o", "dq", "dk", "dv", "dk_other", "dv_other")
    found = {}
    for name, gold, plain, mine in zip(names, exact, low, got):
        rounding = torch.finfo(inputs[0].dtype).eps * gold.abs().max()
        error = (mine - gold).abs().max()
        ratio = float(error / ((plain - gold).abs().max() + rounding)) if error != 0 else 0.0
        if not isfinite(ratio):
            raise WrongResult(f"{phase} {name} is not finite, or not 0 where it must be")
        found[f"{phase} {name}"] = ratio
    return found


def refuse_errors(errors: dict[str, float]) -> None:
    """Raises WrongResult if an error exceeds `ALLOWED_ERROR`: wrong results are not timed."""
    for name, error in errors.items():
        allowed = ALLOWED_ERROR["output" if name.endswith(" o") else "gradient"]
        if error > allowed:
            raise WrongResult(f"{name} errs {error:.2f} times as much as the reference, {allowed:g} allowed")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
