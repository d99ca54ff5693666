"""The Triton kernel of `rope.split`'s gradient: some heads of some tokens per program, in float32."""

import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launcher

_PAIRS, _WARPS = 32, 4  # of a token and a head


@triton.jit
def _sum(x_ptr, at, more_ptr, more_at, there, ADDS: tl.constexpr):
    x = tl.load(x_ptr + at, mask=there, other=0).to(tl.float32)
    if ADDS:
        x += tl.load(more_ptr + more_at, mask=there, other=0).to(tl.float32)
    return x


@triton.jit
def _store_turned(out_ptr, first, second, cos, sin, there, HALF: tl.constexpr):
    """Turned back, by which first and second half of the channels mix."""
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr, (first * cos + second * sin).to(dtype), mask=there)
    tl.store(out_ptr + HALF, (second * cos - first * sin).to(dtype), mask=there)


@triton.jit
def unsplit_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, cos_ptr, sin_ptr, out_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, k2_b, k2_h, k2_n, v2_b, v2_h, v2_n, tokens, heads,
    PARTS: tl.constexpr, TWICE: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, N, PARTS, H, D] of gradients of queries (if PARTS is 3), keys and values, by their strides;
    k2 and v2 are added if TWICE.

    cos, sin: [B, N, D], D = 2 HALF; their halves are equal.
    """
    row, channel = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)[:, None]
    token, head = pair // heads, pair % heads
    there = (token < tokens) & (channel < HALF)
    table = (row * tokens + token) * (2 * HALF) + channel
    cos = tl.load(cos_ptr + table, mask=there, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=there, other=0).to(tl.float32)
    part = heads * (2 * HALF)
    out_ptr += (row * tokens + token) * (PARTS * part) + head * (2 * HALF) + channel
    if PARTS == 3:
        at = row * q_b + head * q_h + token * q_n + channel
        first = _sum(q_ptr, at, q_ptr, at, there, False)
        second = _sum(q_ptr, at + HALF, q_ptr, at, there, False)
        _store_turned(out_ptr, first, second, cos, sin, there, HALF)
        out_ptr += part
    at = row * k_b + head * k_h + token * k_n + channel
    more = row * k2_b + head * k2_h + token * k2_n + channel
    first = _sum(k_ptr, at, k2_ptr, more, there, TWICE)
    second = _sum(k_ptr, at + HALF, k2_ptr, more + HALF, there, TWICE)
    _store_turned(out_ptr, first, second, cos, sin, there, HALF)
    out_ptr += part
    at = row * v_b + head * v_h + token * v_n + channel
    more = row * v2_b + head * v2_h + token * v2_n + channel
    for half in tl.static_range(2):
        v = _sum(v_ptr, at + half * HALF, v2_ptr, more + half * HALF, there, TWICE)
        tl.store(out_ptr + half * HALF, v.to(out_ptr.dtype.element_ty), mask=there)


_launch = Launcher(unsplit_kernel)


def unsplit(gradients: list[Tensor], more: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """See `rope._cpu`."""
    dtype = gradients[0].dtype  # launches are told apart by it
    rows, heads, tokens, dim = gradients[0].shape
    out = gradients[0].new_empty(rows, tokens, len(gradients), heads, dim)
    if not out.numel():
        return out
    tensors = gradients[0], *gradients[-2:], *(more or gradients[-2:])
    tensors = [x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in tensors]
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    tables = [table.to(dtype).contiguous() for table in (cos, sin)]
    _launch(
        (triton.cdiv(tokens * heads, _PAIRS), rows),
        (*tensors, *tables, out),
        (*strides, tokens, heads),
        PARTS=len(gradients), TWICE=bool(more), HALF=dim // 2, PAIRS=_PAIRS,
        BLOCK=triton.next_power_of_2(dim // 2), num_warps=_WARPS,
    )  # fmt: skip
    return out
