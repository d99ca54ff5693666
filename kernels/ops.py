"""The two attention phases as PyTorch operators, with their gradients.

`torch.ops.meloformer.summarize` and `update` are known to autograd and torch.compile. Inputs may have
any strides; those whose channels are not contiguous, or whose heads span 2^31 elements and more, are
copied. Results are transposes of contiguous [B, length, H, D], so that joining the heads is free. The
same inputs always give the same bits, gradients included.
"""

from collections.abc import Sequence
from math import log2

import torch
from torch import Tensor

from .launch import Launch
from .launch_cache import Launcher
from .plan import LINE
from .summarize import summarize_kernel, summary_gradient_kernel, token_gradient_kernel
from .tuning import launches_for
from .update_backward import key_gradient_kernel, query_gradient_kernel
from .update_forward import forward_kernel

_LOG2_E = log2(2.718281828459045)
_SUMMARIES = 16  # that a program of the summarize phase takes
_forward, _query_gradient = Launcher(forward_kernel), Launcher(query_gradient_kernel)
_key_gradient = Launcher(key_gradient_kernel)
_summarize, _summary_gradient = Launcher(summarize_kernel), Launcher(summary_gradient_kernel)
_token_gradient = Launcher(token_gradient_kernel)

_INPUTS = "Tensor q, Tensor k_s, Tensor v_s, Tensor k_r, Tensor v_r"
_BARS = "Tensor bars, Tensor slot"
_PLAN = "Tensor order, Tensor table, Tensor tokens, Tensor bits, Tensor items, Tensor needs"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

_library = torch.library.Library("meloformer", "DEF")
_library.define(f"summarize({_INPUTS}, {_BARS}) -> (Tensor, Tensor)")
_library.define(f"summarize_backward({_INPUTS}, {_BARS}, Tensor o, Tensor lse, Tensor do) -> {_GRADIENTS}")
_library.define(f"update({_INPUTS}, {_PLAN}) -> (Tensor, Tensor)")
_library.define(f"update_backward({_INPUTS}, {_PLAN}, Tensor o, Tensor lse, Tensor do) -> {_GRADIENTS}")


def summarize(q, k_s, v_s, k_r, v_r, bars, slot):
    """o [B, H, M, D] and its log-sum-exp in base 2, float32 [B, H, M]. See `summarize.bars_kernel`."""
    _refuse_mixtures(q, k_s, v_s, k_r, v_r)
    q, k_s, v_s, k_r, v_r = map(_addressable, (q, k_s, v_s, k_r, v_r))
    rows, heads, summaries, dim = q.shape
    o, lse = _outputs(q)
    _summarize(
        (-(-summaries // _SUMMARIES) * heads, rows),
        (q, k_s, v_s, k_r, v_r, o, lse, bars),
        (*_strides(q, k_s, v_s, k_r, v_r, o), dim**-0.5 * _LOG2_E, heads, summaries),
        **_summary_constants(q),
    )
    return o, lse


def summarize_backward(q, k_s, v_s, k_r, v_r, bars, slot, o, lse, do):
    q, k_s, v_s, k_r, v_r, do = map(_addressable, (q, k_s, v_s, k_r, v_r, do))
    o, lse = _as_made(o, q), lse.contiguous()
    rows, heads, summaries, dim = q.shape
    regular, tokens = k_r.shape[2], 2048 // dim  # tokens of a program: what is fast, by trial
    dq, dk_s, dv_s, dk_r, dv_r = map(_empty_like, (q, k_s, v_s, k_r, v_r))
    scales = (dim**-0.5 * _LOG2_E, dim**-0.5, heads, summaries)
    _summary_gradient(
        (2 * -(-summaries // _SUMMARIES) * heads, rows),
        (q, k_s, v_s, k_r, v_r, o, lse, do, dq, dk_s, dv_s, bars),
        (*_strides(q, k_s, v_s, k_r, v_r, do, dq), *scales),
        **_summary_constants(q),
    )
    _token_gradient(
        (-(-regular // tokens) * heads, rows),
        (q, k_r, v_r, o, lse, do, dk_r, dv_r, slot),
        (*_strides(q, k_r, v_r, o, do, dk_r), *scales, regular),
        BN=tokens,
        D=dim,
    )
    return dq, dk_s, dv_s, dk_r, dv_r


def _summary_constants(q: Tensor) -> dict:
    # Tiles of 8 KiB for 64 channels, or 16 in float32 with 128.
    columns = 64 if q.element_size() == 2 else 32
    return {"BM": _SUMMARIES, "BN": columns, "D": q.shape[3], "PRECISION": "ieee"}


def update(q, k_s, v_s, k_r, v_r, *plan):
    """o [B, H, N, D] and its log-sum-exp in base 2, float32 [B, H, N]. See `plan.Plan`."""
    run = Update((q, k_s, v_s, k_r, v_r), plan, kernels=2)
    o, lse = _outputs(q)
    run.forward(o, lse, far=False)
    run.forward(o, lse, far=True)
    return o, lse


def update_backward(q, k_s, v_s, k_r, v_r, *rest):
    *plan, o, lse, do = rest
    run = Update((q, k_s, v_s, k_r, v_r), plan, kernels=4)
    gradients = tuple(map(_empty_like, run.inputs))
    do, stats = _addressable(do), lse.new_empty(*lse.shape, 2)
    o, lse = _as_made(o, run.inputs[0]), lse.contiguous()
    for far in (False, True):
        run.query_gradient(gradients[0], o, lse, do, stats, far)
        run.key_gradients(gradients[1:], do, stats, far)
    return gradients


class Update:
    """The launches of the update phase on some inputs: what they have in common is found out once.

    Every launch writes in the near pass, and continues or adds in the far one.
    """

    def __init__(self, inputs: Sequence[Tensor], plan: Sequence[Tensor], kernels: int):
        """`plan` as in `plan.Plan.tensors`; `kernels` is the number of launches to come."""
        _refuse_mixtures(*inputs)
        self.inputs = tuple(map(_addressable, inputs))
        q, k_s = self.inputs[:2]
        self.plan = tuple(plan)
        self.rows, self.heads, self.queries, self.dim = q.shape
        self.summaries = k_s.shape[2]
        self.q_blocks = -(-self.queries // LINE)
        self.k_blocks = self.q_blocks + -(-self.summaries // LINE)
        self.items = plan[4].shape[1]
        self.slots = self.items - self.rows * self.k_blocks
        # Parts of split lines, dk and dv or less; and per launch a zero for each.
        part = 2 * LINE * (self.dim + 2)
        self.parts = q.new_empty((self.slots, self.heads, part), dtype=torch.float32)
        self.counted = self.slots * self.heads * (LINE // 16)
        self.counters = plan[4].new_zeros(kernels * self.counted)
        self.launched = 0
        self.launches = launches_for(q.device, q.dtype, self.dim)
        self.scale = self.dim**-0.5
        self.strides = _strides(*self.inputs)

    def forward(self, o: Tensor, lse: Tensor, far: bool) -> None:
        launch = self.launches.forward_far if far else self.launches.forward_near
        programs, geometry = self._group(launch, far, by_keys=False)
        _forward(
            programs,
            (*self.inputs, o, lse, self.parts, self.counters, *self.plan),
            (*self.strides, *_strides(o), self.scale * _LOG2_E, self.heads, self.queries, *geometry),
            **_constants(launch, self.dim, not far),
        )

    def query_gradient(
        self, dq: Tensor, o: Tensor, lse: Tensor, do: Tensor, stats: Tensor, far: bool
    ) -> None:
        """The near pass also writes `stats`, float32 [B, H, N, 2], which all later launches need."""
        launch = self.launches.dq_far if far else self.launches.dq_near
        programs, geometry = self._group(launch, far, by_keys=False)
        _query_gradient(
            programs,
            (*self.inputs, o, lse, do, stats, dq, self.parts, self.counters, *self.plan),
            (
                *self.strides,
                *_strides(do, dq),
                *(self.scale * _LOG2_E, self.scale, self.heads, self.queries),
                *geometry,
            ),
            **_constants(launch, self.dim, not far),
        )

    def key_gradients(self, gradients: Sequence[Tensor], do: Tensor, stats: Tensor, far: bool) -> None:
        """Of k_s, v_s, k_r and v_r."""
        launch = self.launches.dkv_far if far else self.launches.dkv_near
        programs, geometry = self._group(launch, far, by_keys=True)
        dk_s, _, dk_r, _ = gradients  # dv has the strides of dk
        _key_gradient(
            programs,
            (*self.inputs, do, stats, *gradients, self.parts, self.counters, *self.plan),
            (
                *self.strides,
                *_strides(do, dk_s, dk_r),
                *(self.scale * _LOG2_E, self.scale, self.heads, self.queries),
                *geometry,
            ),
            **_constants(launch, self.dim, not far),
        )

    def _group(self, launch: Launch, far: bool, by_keys: bool) -> tuple[tuple[int], tuple[int, ...]]:
        """The programs of a group, and its geometry as the kernels take it."""
        rows, q_blocks, k_blocks = self.rows, self.q_blocks, self.k_blocks
        blocks = k_blocks if by_keys and not far else q_blocks
        if far:
            first = rows * (q_blocks + k_blocks), rows * (2 * q_blocks + k_blocks if by_keys else q_blocks)
        else:
            first = (rows * q_blocks, 2 * rows * q_blocks) if by_keys else (0, 0)
        programs = (rows * blocks + self.slots) * (LINE // launch.rows) * self.heads
        counter = self.launched * self.counted
        self.launched += 1
        return (programs,), (self.summaries, blocks, *first, 2 * by_keys + far, self.items, counter)


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


def _as_made(o: Tensor, q: Tensor) -> Tensor:
    """`o` in the strides that `_outputs` gave it, if someone has laid it out anew since."""
    made = _empty_like(q)
    return o if o.stride() == made.stride() else made.copy_(o)


def _refuse_mixtures(q: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> None:
    """Raises ValueError for shapes or dtypes that do not belong together: kernels would read beyond them."""
    rows, heads, _, dim = q.shape
    for k, v in ((k_s, v_s), (k_r, v_r)):
        if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (rows, heads, dim):
            shapes = [list(x.shape) for x in (q, k, v)]
            raise ValueError(f"queries, keys and values do not fit each other: {shapes}")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(
                f"queries, keys and values must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
            )


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _strides(*tensors: Tensor) -> list[int]:
    """Of row, head and token of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _refuse_second_gradients(ctx, *gradients):
    raise RuntimeError("attention 'triton' can be differentiated once: take 'reference' for second gradients")


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
    torch.library.register_autograd(f"{qualified}_backward", _refuse_second_gradients, lib=_library)


_register("summarize", summarize, summarize_backward)
_register("update", update, update_backward)
