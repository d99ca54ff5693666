"""The two attention phases as PyTorch operators, with their gradients.

`torch.ops.meloformer.summarize` and `update` are known to autograd and torch.compile. Inputs may have
any strides; those whose channels are not contiguous, or whose heads span 2^31 elements and more, are
copied. Results are transposes of contiguous [B, length, H, D], so that joining the heads is free. The
same inputs always give the same bits, gradients included.
"""

from math import log2

import torch
from torch import Tensor

from .backward import key_gradient_kernel, query_gradient_kernel, sum_parts_kernel
from .forward import forward_kernel
from .launch import Launch
from .launcher import Launcher
from .plan import LINE
from .plan_kernels import ITEMS, SPLIT
from .summarize import summarize_kernel, summary_gradient_kernel, token_gradient_kernel
from .tuning import launches_for

_LOG2_E = log2(2.718281828459045)
_TILE = 2048  # elements that a program of the summarize phase takes at a time
_SUM_ROWS = 16  # rows of a line that one program sums
_forward, _query_gradient = Launcher(forward_kernel), Launcher(query_gradient_kernel)
_key_gradient, _sum_parts = Launcher(key_gradient_kernel), Launcher(sum_parts_kernel)
_summarize, _summary_gradient = Launcher(summarize_kernel), Launcher(summary_gradient_kernel)
_token_gradient = Launcher(token_gradient_kernel)

_INPUTS = "Tensor q, Tensor k_s, Tensor v_s, Tensor k_r, Tensor v_r"
_BARS = "Tensor bars, Tensor slot"
_PLAN = (
    "Tensor order, Tensor table, Tensor tokens, Tensor bits, "
    "Tensor work, Tensor items, Tensor splits, Tensor needs"
)
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

_library = torch.library.Library("meloformer", "DEF")
_library.define(f"summarize({_INPUTS}, {_BARS}) -> (Tensor, Tensor)")
_library.define(f"summarize_backward({_INPUTS}, {_BARS}, Tensor o, Tensor lse, Tensor do) -> {_GRADIENTS}")
_library.define(f"update({_INPUTS}, {_PLAN}) -> (Tensor, Tensor)")
_library.define(f"update_backward({_INPUTS}, {_PLAN}, Tensor o, Tensor lse, Tensor do) -> {_GRADIENTS}")


def summarize(q, k_s, v_s, k_r, v_r, bars, slot):
    """o [B, H, M, D] and its log-sum-exp in base 2, float32 [B, H, M]. See `summarize.bars_kernel`."""
    q, k_s, v_s, k_r, v_r = map(_addressable, (q, k_s, v_s, k_r, v_r))
    rows, heads, summaries, dim = q.shape
    o, lse = _outputs(q)
    _summarize(
        (summaries * heads, rows),
        (q, k_s, v_s, k_r, v_r, o, lse, bars),
        (*_strides(q, k_s, v_s, k_r, v_r, o), dim**-0.5 * _LOG2_E, heads, summaries),
        BN=_TILE // dim, D=dim, num_warps=2,
    )  # fmt: skip
    return o, lse


def summarize_backward(q, k_s, v_s, k_r, v_r, bars, slot, o, lse, do):
    q, k_s, v_s, k_r, v_r, do = map(_addressable, (q, k_s, v_s, k_r, v_r, do))
    rows, heads, summaries, dim = q.shape
    regular = k_r.shape[2]
    dq, dk_s, dv_s, dk_r, dv_r = map(_empty_like, (q, k_s, v_s, k_r, v_r))
    scales = (dim**-0.5 * _LOG2_E, dim**-0.5, heads, summaries)
    _summary_gradient(
        (summaries * heads, rows),
        (q, k_s, v_s, k_r, v_r, o, lse, do, dq, dk_s, dv_s, bars),
        (*_strides(q, k_s, v_s, k_r, v_r, do, dq), *scales),
        BN=_TILE // dim, D=dim, num_warps=4,
    )  # fmt: skip
    _token_gradient(
        (-(-regular // (_TILE // dim)) * heads, rows),
        (q, k_r, v_r, o, lse, do, dk_r, dv_r, slot),
        (*_strides(q, k_r, v_r, o, do, dk_r), *scales, regular),
        BN=_TILE // dim, D=dim,
    )  # fmt: skip
    return dq, dk_s, dv_s, dk_r, dv_r


def update(q, k_s, v_s, k_r, v_r, *plan):
    """o [B, H, N, D] and its log-sum-exp in base 2, float32 [B, H, N]. See `plan.Plan`."""
    inputs = tuple(map(_addressable, (q, k_s, v_s, k_r, v_r)))
    o, lse = _outputs(q)
    for far in (False, True):
        add_forward(o, lse, *inputs, plan, far)
    return o, lse


def update_backward(q, k_s, v_s, k_r, v_r, *rest):
    *plan, o, lse, do = rest
    inputs, do = tuple(map(_addressable, (q, k_s, v_s, k_r, v_r))), _addressable(do)
    gradients = tuple(map(_empty_like, inputs))
    stats = lse.new_empty(*lse.shape, 2)
    for far in (False, True):
        add_query_gradient(gradients[0], *inputs, o, lse, do, stats, plan, far)
        add_key_gradients(gradients[1:], *inputs, do, stats, plan, far)
    return gradients


def add_forward(o, lse, q, k_s, v_s, k_r, v_r, plan, far: bool) -> None:
    """One pass of o and lse: written by the near pass, continued by the far one."""
    order, table, tokens, bits, work, *_ = plan
    rows, heads, queries, dim = q.shape
    tuned = launches_for(q.device, q.dtype, dim)
    launch = tuned.forward_far if far else tuned.forward_near
    blocks = -(-queries // LINE)
    lines = rows * blocks
    _forward(
        (lines * (LINE // launch.rows) * heads,),
        (q, k_s, v_s, k_r, v_r, o, lse, order, table, tokens, bits, work[lines:] if far else work),
        (
            *_strides(q, k_s, v_s, k_r, v_r, o),
            *(dim**-0.5 * _LOG2_E, heads, queries, k_s.shape[2], blocks),
            *_first(q, k_s, far, by_keys=False),
        ),
        **_constants(launch, dim, not far),
    )


def add_query_gradient(dq, q, k_s, v_s, k_r, v_r, o, lse, do, stats, plan, far: bool) -> None:
    """One pass of dq: written by the near pass, added to by the far one. The near pass also writes
    `stats`, float32 [B, H, N, 2], which all later kernels of the backward need."""
    order, table, tokens, bits, work, *_ = plan
    rows, heads, queries, dim = q.shape
    tuned = launches_for(q.device, q.dtype, dim)
    launch = tuned.dq_far if far else tuned.dq_near
    blocks = -(-queries // LINE)
    lines = rows * blocks
    work = work[lines:] if far else work
    _query_gradient(
        (lines * (LINE // launch.rows) * heads,),
        (q, k_s, v_s, k_r, v_r, o, lse, do, stats, dq, order, table, tokens, bits, work),
        (
            *_strides(q, k_s, v_s, k_r, v_r, do, dq),
            *(dim**-0.5 * _LOG2_E, dim**-0.5, heads, queries, k_s.shape[2], blocks),
            *_first(q, k_s, far, by_keys=False),
        ),
        **_constants(launch, dim, not far),
    )


def add_key_gradients(gradients, q, k_s, v_s, k_r, v_r, do, stats, plan, far: bool) -> None:
    """One pass of dk_s, dv_s, dk_r and dv_r: written by the near pass, added to by the far one."""
    order, table, tokens, bits, _, items, splits, needs = plan
    rows, heads, queries, dim = q.shape
    tuned = launches_for(q.device, q.dtype, dim)
    launch = tuned.dkv_far if far else tuned.dkv_near
    dk_s, _, dk_r, _ = gradients  # dv has the strides of dk
    q_blocks, slots = -(-queries // LINE), splits.shape[0]
    blocks = q_blocks + (0 if far else -(-k_s.shape[2] // LINE))
    parts = q.new_empty((0 if far else slots, heads, 2, LINE, dim), dtype=torch.float32)
    first_block, first_line = _first(q, k_s, far, by_keys=True)
    needed, numbers = needs[ITEMS.value :], (heads, queries, k_s.shape[2], blocks, first_block, first_line)
    _key_gradient(
        ((rows * q_blocks if far else items.shape[1]) * (LINE // launch.rows) * heads,),
        (
            *(q, k_s, v_s, k_r, v_r, do, stats, *gradients, stats if far else parts),
            *(order, table, tokens, bits, items[int(far)], needed),
        ),
        (*_strides(q, k_s, v_s, k_r, v_r, do, dk_s, dk_r), dim**-0.5 * _LOG2_E, dim**-0.5, *numbers),
        **_constants(launch, dim, not far),
    )
    if not far:
        _sum_parts(
            (slots // 2 * (LINE // _SUM_ROWS) * heads,),
            (parts, *gradients, order, splits, needs[SPLIT.value :]),
            (*_strides(dk_s, dk_r), heads, k_s.shape[2], blocks, first_block),
            BM=_SUM_ROWS, D=dim,
        )  # fmt: skip


def _first(q: Tensor, k_s: Tensor, far: bool, by_keys: bool) -> tuple[int, int]:
    """The first block, in the layouts, and the first line of a group."""
    rows, q_blocks = q.shape[0], -(-q.shape[2] // LINE)
    k_blocks = q_blocks + -(-k_s.shape[2] // LINE)
    if far:
        return rows * (q_blocks + k_blocks), rows * (2 * q_blocks + k_blocks if by_keys else q_blocks)
    return (rows * q_blocks, 2 * rows * q_blocks) if by_keys else (0, 0)


def _constants(launch: Launch, dim: int, first: bool) -> dict:
    constants = {
        "FIRST": first,
        "BM": launch.rows,
        "BN": launch.columns,
        "D": dim,
        "PRECISION": "ieee",
        "STAGES": launch.stages,
        "num_warps": launch.warps,
    }
    return constants if launch.registers is None else constants | {"maxnreg": launch.registers}


def _addressable(x: Tensor) -> Tensor:
    """`x`, or a copy with contiguous channels and offsets within a head that fit 32 bits."""
    fits = x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31
    return x if fits else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """[B, H, length, D] laid out as [B, length, H, D]."""
    rows, heads, length, dim = x.shape
    return x.new_empty(rows, length, heads, dim).transpose(1, 2)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _strides(*tensors: Tensor) -> list[int]:
    """Of row, head and token of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _register(name: str, forward, backward) -> None:
    """The operator `name` with its kernels, its shapes and its gradient."""

    def save(ctx, inputs, output):
        o, lse = output
        ctx.save_for_backward(*inputs, o, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, do, _):
        others = len(ctx.saved_tensors) - 7
        if do is None:
            return (None,) * (5 + others)
        run = getattr(torch.ops.meloformer, f"{name}_backward")
        return (*run(*ctx.saved_tensors, do), *[None] * others)

    for device in ("CPU", "CUDA"):
        _library.impl(name, forward, device)
        _library.impl(f"{name}_backward", backward, device)
    qualified = f"meloformer::{name}"
    torch.library.register_fake(qualified, lambda q, *_: _outputs(q), lib=_library)
    torch.library.register_fake(
        f"{qualified}_backward", lambda *x: tuple(map(_empty_like, x[:5])), lib=_library
    )
    torch.library.register_autograd(qualified, differentiate, setup_context=save, lib=_library)


_register("summarize", summarize, summarize_backward)
_register("update", update, update_backward)
