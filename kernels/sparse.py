"""Sparse attention over the passes of a plan: launches of the Triton kernels, and their gradient."""

from functools import cache
from math import log2

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backward import key_gradient_kernel, query_gradient_kernel, stats_kernel, sum_parts_kernel
from .forward import forward_kernel
from .plan import Lines, Pass
from .tiling import Launch, fitting

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_STATS_BLOCK = 64
_LOG2_E = log2(2.718281828459045)


def sparse_attention(
    q: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor, passes: tuple[Pass, ...]
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V over the pairs of `passes`; [B, H, length, D], as q.

    The result is the transpose of a contiguous [B, length, H, D], so that joining the heads is free.
    Inputs of any strides; those whose channels are not contiguous, or whose heads span 2^31 elements
    and more, are copied. The same inputs always give the same bits, gradients included.

    Raises:
        ValueError: D is not in `HEAD_DIMS`, or the dtype is not in `DTYPES`.
    """
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"attention 'triton' takes {HEAD_DIMS} channels per head, got {q.shape[-1]}")
    if q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"attention 'triton' computes in {names}, got {q.dtype}")
    return _SparseAttention.apply(q, k_s, v_s, k_r, v_r, passes)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_s, v_s, k_r, v_r, passes):
        inputs = [_addressable(x) for x in (q, k_s, v_s, k_r, v_r)]
        o, lse = forward(*inputs, passes)
        ctx.save_for_backward(*inputs, o, lse)
        ctx.passes = passes
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        *inputs, o, lse = ctx.saved_tensors
        return *backward(*inputs, o, lse, _addressable(do), ctx.passes), None


def forward(
    q: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor, passes: tuple[Pass, ...]
) -> tuple[Tensor, Tensor]:
    """o [B, H, length, D] and its log-sum-exp in base 2, float32 [B, H, length]."""
    rows, heads, queries, dim = q.shape
    o = _empty_like(q)
    lse = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
    for p in passes:
        if not len(p.query_work):
            continue
        tiles = p.tiles
        launch = _launch(tiles.forward, q, tiles.block_m, 2 * tiles.block_n)
        forward_kernel[(len(p.query_work) * heads,)](
            q, k_s, v_s, k_r, v_r, o, lse,
            *_strides(q, k_s, v_s, k_r, v_r, o),
            p.query_order, p.key_order, *_lists(p.queries), p.query_work,
            dim**-0.5 * _LOG2_E, heads, queries, p.q_blocks, p.k_blocks, k_s.shape[2],
            FIRST=p.first, SUMMARIES=p.sees_summaries, BM=tiles.block_m, BN=tiles.block_n, D=dim,
            PRECISION="ieee", STAGES=launch.stages, num_warps=launch.warps,
        )  # fmt: skip
    return o, lse


def backward(
    q: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor,
    o: Tensor, lse: Tensor, do: Tensor, passes: tuple[Pass, ...],
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k_s, v_s, k_r and v_r, given that of o."""
    inputs = (q, k_s, v_s, k_r, v_r)
    stats = row_stats(o, lse, do)
    dq, *key_gradients = gradients = [_empty_like(x) for x in inputs]
    for p in passes:
        add_query_gradient(dq, *inputs, do, stats, p)
        add_key_gradients(key_gradients, *inputs, do, stats, p)
    return gradients


def row_stats(o: Tensor, lse: Tensor, do: Tensor) -> Tensor:
    """What the gradients need of every query: lse and delta = rowsum(dO * O), float32 [B, H, length, 2]."""
    rows, heads, queries, dim = o.shape
    stats = torch.empty(rows, heads, queries, 2, dtype=torch.float32, device=o.device)
    stats_kernel[-(-queries // _STATS_BLOCK), rows * heads](
        o, do, lse, stats, *_strides(o, do), heads, queries, BLOCK=_STATS_BLOCK, D=dim
    )
    return stats


def add_query_gradient(
    dq: Tensor, q: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor,
    do: Tensor, stats: Tensor, p: Pass,
) -> None:  # fmt: skip
    """One pass's part of dq, written if the pass is the first."""
    _, heads, queries, dim = q.shape
    if not len(p.query_work):
        return
    m, n = p.tiles.block_m, p.tiles.block_n
    launch = _launch(p.tiles.dq, q, 2 * m, 2 * n)
    query_gradient_kernel[(len(p.query_work) * heads,)](
        q, k_s, v_s, k_r, v_r, do, stats, dq, *_strides(q, k_s, v_s, k_r, v_r, do, dq),
        p.query_order, p.key_order, *_lists(p.queries), p.query_work,
        dim**-0.5 * _LOG2_E, dim**-0.5, heads, queries, p.q_blocks, p.k_blocks, k_s.shape[2],
        FIRST=p.first, SUMMARIES=p.sees_summaries, BM=m, BN=n, D=dim,
        PRECISION="ieee", STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip


def add_key_gradients(
    gradients: list[Tensor], q: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor,
    do: Tensor, stats: Tensor, p: Pass,
) -> None:  # fmt: skip
    """One pass's part of dk_s, dv_s, dk_r and dv_r, written if the pass is the first."""
    _, heads, queries, dim = q.shape
    if not len(p.key_work):
        return
    m, n = p.tiles.block_m, p.tiles.block_n
    launch = _launch(p.tiles.dkv, q, 2 * n, 2 * m)
    dk_s, _, dk_r, _ = gradients  # dv has the strides of dk
    parts = torch.empty(p.slots, heads, 2, n, dim, dtype=torch.float32, device=q.device)
    blocks, partial, _, bits, start = _lists(p.keys)
    key_gradient_kernel[(len(p.key_work) * heads,)](
        q, k_s, v_s, k_r, v_r, do, stats, *gradients, parts,
        *_strides(q, k_s, v_s, k_r, v_r, do, dk_s, dk_r),
        p.query_order, p.key_order, blocks, partial, bits, start, p.key_work,
        dim**-0.5 * _LOG2_E, dim**-0.5, heads, queries, p.q_blocks, p.k_blocks, k_s.shape[2],
        FIRST=p.first, BM=m, BN=n, D=dim, PRECISION="ieee", STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    if p.slots:
        sum_parts_kernel[(len(p.split_keys) * heads,)](
            parts, *gradients, *_strides(dk_s, dk_r), p.key_order, p.split_keys,
            heads, p.k_blocks, k_s.shape[2], FIRST=p.first, BN=n, D=dim,
        )  # fmt: skip


def _addressable(x: Tensor) -> Tensor:
    """`x`, or a copy with contiguous channels and offsets within a head that fit 32 bits."""
    fits = x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31
    return x if fits else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """[B, H, length, D] laid out as [B, length, H, D]."""
    rows, heads, length, dim = x.shape
    return x.new_empty(rows, length, heads, dim).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    """Of row, head and token of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _lists(lines: Lines) -> tuple[Tensor, ...]:
    return lines.blocks, lines.partial, lines.total, lines.bits, lines.start


def _launch(launch: Launch, like: Tensor, resident: int, streamed: int) -> Launch:
    """`launch` made to fit the device; `resident` and `streamed` are vectors of D channels."""
    vector = like.shape[-1] * like.element_size()
    if like.dtype == torch.float32:
        # Products without tensor cores: in fewer warps their operands overflow the registers.
        launch = Launch(warps=16, stages=1)
    return fitting(launch, resident * vector, streamed * vector, _shared_memory(like.device))


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a program may use; the smallest of the supported GPUs where there is no GPU (interpreter)."""
    if device.type != "cuda":
        return 99 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
