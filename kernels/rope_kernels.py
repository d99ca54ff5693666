"""The Triton kernel of the gradient of `rope.split_and_rotate`: some (token, head) pairs per program, in
float32."""

import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launcher

_PAIRS, _WARPS = 32, 4  # pairs of a token and a head that a program takes


@triton.jit
def _load_sum(x_ptr, offs, y_ptr, y_offs, mask, ADDS: tl.constexpr):
    """x, or if ADDS x + y, [PAIRS, BLOCK] in float32."""
    x = tl.load(x_ptr + offs, mask=mask, other=0).to(tl.float32)
    if ADDS:
        x += tl.load(y_ptr + y_offs, mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def _store_rotated_back(out_ptrs, first, second, cos, sin, mask, HALF: tl.constexpr):
    """Stores the two halves of the channels, each [PAIRS, BLOCK], rotated by the negative angles."""
    dtype = out_ptrs.dtype.element_ty
    tl.store(out_ptrs, (first * cos + second * sin).to(dtype), mask=mask)
    tl.store(out_ptrs + HALF, (second * cos - first * sin).to(dtype), mask=mask)


@triton.jit
def split_gradient_kernel(
    dq_ptr, dk_ptr, dv_ptr, dk2_ptr, dv2_ptr, cos_ptr, sin_ptr, out_ptr,
    dq_strides, dk_strides, dv_strides, dk2_strides, dv2_strides, tokens, heads,
    PARTS: tl.constexpr, DUPLICATED: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, N, PARTS, H, D] from the gradients of queries (if PARTS is 3), keys and values.

    Strides are those of (batch, head, token). dk2 and dv2 are added if DUPLICATED. cos, sin: [B, N, D],
    D = 2 HALF, of equal halves. Tiles are [PAIRS, BLOCK], pairs of a token and a head by channels of one
    half.
    """
    b, channel = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)[:, None]
    n, h = pair // heads, pair % heads
    mask = (n < tokens) & (channel < HALF)
    table_offs = (b * tokens + n) * (2 * HALF) + channel
    cos = tl.load(cos_ptr + table_offs, mask=mask, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + table_offs, mask=mask, other=0).to(tl.float32)
    part = heads * (2 * HALF)
    out_ptrs = out_ptr + ((b * tokens + n) * (PARTS * part) + h * (2 * HALF) + channel)
    if PARTS == 3:
        offs = b * dq_strides[0] + h * dq_strides[1] + n * dq_strides[2] + channel
        first = _load_sum(dq_ptr, offs, dq_ptr, offs, mask, False)
        second = _load_sum(dq_ptr, offs + HALF, dq_ptr, offs, mask, False)
        _store_rotated_back(out_ptrs, first, second, cos, sin, mask, HALF)
        out_ptrs += part
    offs = b * dk_strides[0] + h * dk_strides[1] + n * dk_strides[2] + channel
    offs2 = b * dk2_strides[0] + h * dk2_strides[1] + n * dk2_strides[2] + channel
    first = _load_sum(dk_ptr, offs, dk2_ptr, offs2, mask, DUPLICATED)
    second = _load_sum(dk_ptr, offs + HALF, dk2_ptr, offs2 + HALF, mask, DUPLICATED)
    _store_rotated_back(out_ptrs, first, second, cos, sin, mask, HALF)
    out_ptrs += part
    offs = b * dv_strides[0] + h * dv_strides[1] + n * dv_strides[2] + channel
    offs2 = b * dv2_strides[0] + h * dv2_strides[1] + n * dv2_strides[2] + channel
    for half in tl.static_range(2):
        dv = _load_sum(dv_ptr, offs + half * HALF, dv2_ptr, offs2 + half * HALF, mask, DUPLICATED)
        tl.store(out_ptrs + half * HALF, dv.to(out_ptr.dtype.element_ty), mask=mask)


_split_gradient = Launcher(split_gradient_kernel)


def split_backward(gradients: list[Tensor], duplicates: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """See `rope._cpu_backward`."""
    dtype = gradients[0].dtype  # of all tensors: it is part of the launcher's key
    batch, heads, tokens, dim = gradients[0].shape
    out = gradients[0].new_empty(batch, tokens, len(gradients), heads, dim)
    if not out.numel():
        return out
    tensors = gradients[0], *gradients[-2:], *(duplicates or gradients[-2:])
    tensors = [x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in tensors]
    tables = [table.to(dtype).contiguous() for table in (cos, sin)]
    _split_gradient(
        (triton.cdiv(tokens * heads, _PAIRS), batch),
        (*tensors, *tables, out),
        (*(x.stride()[:3] for x in tensors), tokens, heads),
        PARTS=len(gradients), DUPLICATED=bool(duplicates), HALF=dim // 2, PAIRS=_PAIRS,
        BLOCK=triton.next_power_of_2(dim // 2), num_warps=_WARPS,
    )  # fmt: skip
    return out
