"""The two attention phases as PyTorch operators, with their gradients.

`torch.ops.meloformer.summarize` and `update` work with autograd, once, and with torch.compile. Inputs may
have any strides; those whose channels are not contiguous, whose tokens do not begin at multiples of 16 bytes,
or whose heads span 2^31 elements or more, are copied. Results are transposes of contiguous
[B, length, H, D], so that merging the heads needs no copy. They are bitwise deterministic, gradients
included.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from . import counters, overlap
from .launch import Launch, Specialized, are_few, launches_for
from .launch_cache import Launcher
from .operators import register, register_gradient
from .plan import BLOCK
from .summarize import summarize_gradient_kernel, summarize_kernel
from .tiles import LOG2_E, PAIRS
from .update_backward import key_gradient_kernel, query_gradient_kernel
from .update_forward import forward_kernel

_BLOCK_M = 16  # rows of a tile of summaries: the fewest that a matrix instruction multiplies
# The most summaries of a program; and so many programs, or fewer summaries in each: a long bar is read by one
# program alone. Those of the backward are longer, and fewer of them run at once.
_FORWARD_MOST, _FORWARD_PROGRAMS = 4, 512
_BACKWARD_MOST, _BACKWARD_PROGRAMS = 8, 384
_BAR = 64  # tokens of a short one
_PADDING = 256  # tokens of a program that looks for padding
_forward, _query_gradient = Launcher(forward_kernel), Launcher(query_gradient_kernel)
_key_gradient = Launcher(key_gradient_kernel)
_summarize, _gradients = Launcher(summarize_kernel), Launcher(summarize_gradient_kernel)


def summarize(q, k_s, v_s, k_r, v_r, bars, slot):
    """o [B, H, M, D] and its log-sum-exp in base 2, float32 [B, H, M].

    Args:
        q, k_s, v_s: [B, H, M, D]. k_r, v_r: [B, H, N, D].
        bars, slot: see `summarize.bars_kernel`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    _check_inputs(q, k_s, v_s, k_r, v_r)
    q, k_s, v_s, k_r, v_r = map(_addressable, (q, k_s, v_s, k_r, v_r))
    batch, heads, summaries, dim = q.shape
    o, lse = _outputs(q)
    own = _summaries_of_program(q, k_r, _FORWARD_MOST, _FORWARD_PROGRAMS)
    _summarize(
        (-(-summaries // own) * heads, batch),
        (q, k_s, v_s, k_r, v_r, o, lse, bars),
        (*_strides(q, k_s, v_s, k_r, v_r, o), dim**-0.5 * LOG2_E, heads, summaries),
        **_summary_constants(q, own),
        # Each takes all rows of a tile and some of its keys: few need not wait for each other, if they fit.
        num_warps=max(2, dim * q.element_size() // 64),
    )
    return o, lse


def summarize_backward(q, k_s, v_s, k_r, v_r, bars, slot, o, lse, do):
    q, k_s, v_s, k_r, v_r, do = map(_addressable, (q, k_s, v_s, k_r, v_r, do))
    o, lse = _with_output_strides(o, q), lse.contiguous()
    batch, heads, summaries, dim = q.shape
    regular = k_r.shape[2]
    dq, dk_s, dv_s, dk_r, dv_r = map(_empty_like, (q, k_s, v_s, k_r, v_r))
    own = _summaries_of_program(q, k_r, _BACKWARD_MOST, _BACKWARD_PROGRAMS)
    of_both = -(-summaries // _BLOCK_M) - (-summaries // own)
    _gradients(
        (of_both * heads - (-regular // _PADDING), batch),
        (q, k_s, v_s, k_r, v_r, o, lse, do, dq, dk_s, dv_s, dk_r, dv_r, bars, slot),
        (
            *_strides(q, k_s, v_s, k_r, v_r, do, dq, dk_r),
            *(dim**-0.5 * LOG2_E, dim**-0.5, heads, summaries, regular),
        ),
        **_summary_constants(q, own, PADDING=_PADDING),
        # Gradients of a tile of 64 tokens are too much for the registers of fewer.
        num_warps=8 if dim == 128 else 4,
    )
    return dq, dk_s, dv_s, dk_r, dv_r


def _summaries_of_program(q: Tensor, k_r: Tensor, most: int, programs: int) -> int:
    """A power of two up to `most`, so that there are `programs` or more.

    Rows are made with room for more summaries than they have: what counts is how many there may be of bars
    of `_BAR` tokens.
    """
    batch, heads, summaries, _ = q.shape
    count = batch * heads * min(summaries, -(-k_r.shape[2] // _BAR))
    own = most
    while own > 1 and count < own * programs:
        own //= 2
    return own


def _summary_constants(q: Tensor, own: int, **more: int) -> dict:
    """In the order of the kernels' parameters, then options of the compiler."""
    overlaps, line = overlap.can_overlap(q.device), q.shape[3] * q.element_size()
    constants = {"OVERLAPS": overlaps, "OWN": own, **more, "BM": _BLOCK_M, "D": q.shape[3]}
    # With three stages the next tile is on its way, with two it is loaded when this one has been used: where
    # rows of keys are longer there is no memory for two.
    constants |= {"BN": 64 if q.element_size() == 2 else 32, "STAGES": 3 if line <= 128 else 2}
    return constants | {"PRECISION": "ieee"} | overlap.options(overlaps)


def update(q, k_s, v_s, k_r, v_r, *plan):
    """o [B, H, N, D] and its log-sum-exp in base 2, float32 [B, H, N].

    Args:
        q, k_r, v_r: [B, H, N, D]. k_s, v_s: [B, H, M, D].
        plan: see `plan.Plan.tensors`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    run = Update((q, k_s, v_s, k_r, v_r), plan)
    o, lse = _outputs(q)
    run.forward(o, lse, same_inst=False)
    run.forward(o, lse, same_inst=True)
    return o, lse


def update_backward(q, k_s, v_s, k_r, v_r, *rest):
    *plan, o, lse, do = rest
    run = Update((q, k_s, v_s, k_r, v_r), plan)
    gradients = tuple(map(_empty_like, run.inputs))
    do, stats = _addressable(do), lse.new_empty(*lse.shape, 2)
    o, lse = _with_output_strides(o, run.inputs[0]), lse.contiguous()

    def of_queries(same_inst: bool) -> None:
        run.query_gradient(gradients[0], o, lse, do, stats, same_inst)

    def of_keys(same_inst: bool) -> None:
        run.key_gradients(gradients[1:], do, stats, same_inst)

    # All but the first start while others run. Of the two in the middle, the one that leaves less of the GPU
    # idle comes first: see docs/attention.md.
    of_queries(same_inst=False)
    if run.few:
        of_queries(same_inst=True)
        of_keys(same_inst=False)
    else:
        of_keys(same_inst=False)
        of_queries(same_inst=True)
    of_keys(same_inst=True)
    return gradients


class Update:
    """The launches of the update phase on some inputs, with what they have in common.

    Every kernel runs once for each pass: the local pass writes its results, the same-instrument pass
    (`same_inst`), which comes later, continues or adds to them. Where launches overlap, only the local passes
    of the forward and of the gradient of queries wait for all that was launched before, see
    `tiles.start_program`.

    Attributes:
        few: whether all programs of a kernel run at once, or nearly so.
    """

    def __init__(self, inputs: Sequence[Tensor], plan: Sequence[Tensor]):
        """
        Args:
            inputs: q [B, H, N, D], k_s and v_s [B, H, M, D], k_r and v_r [B, H, N, D].
            plan: see `plan.Plan.tensors`; finalized, since a plan that lacks items leaves counters that are
                not zero.
        """
        _check_inputs(*inputs)
        self.inputs = tuple(map(_addressable, inputs))
        q, k_s = self.inputs[:2]
        self.plan = tuple(plan)
        self.batch, self.heads, self.queries, self.dim = q.shape
        self.summaries = k_s.shape[2]
        self.q_blocks = -(-self.queries // BLOCK)
        self.k_blocks = self.q_blocks + -(-self.summaries // BLOCK)
        self.items = plan[3].shape[1]
        self.slots = self.items - self.batch * self.k_blocks
        # Partial results of split blocks, at most dk and dv; and a counter per slot, head and program. No
        # kernel touches either before the one before it has ended.
        partial = 2 * BLOCK * (self.dim + 2)
        self.partials = q.new_empty((self.slots, self.heads, partial), dtype=torch.float32)
        self.counters = counters.zeros(self.slots * self.heads * (BLOCK // 16), q.device)
        programs = self.batch * self.q_blocks * self.heads
        self.few = are_few(programs, q.device)
        self.launches = launches_for(q.device, q.dtype, self.dim, programs)
        self.scale = self.dim**-0.5
        self.strides = _strides(*self.inputs)
        self.overlaps = overlap.can_overlap(q.device)

    def forward(self, o: Tensor, lse: Tensor, same_inst: bool) -> None:
        launch = self.launches.forward_same_inst if same_inst else self.launches.forward_local
        constants = self._constants(launch, same_inst)
        if isinstance(launch, Specialized):  # which is of the same-instrument pass alone
            kernel = _specialized()[0]
            del constants["FIRST"]
            programs, geometry = self._pairs()
        else:
            kernel = _forward
            programs, geometry = self._group(launch, same_inst, by_keys=False)
        kernel(
            programs,
            (*self.inputs, o, lse, self.partials, self.counters, *self.plan),
            (*self.strides, *_strides(o), self.scale * LOG2_E, self.heads, self.queries, *geometry),
            **constants,
        )

    def query_gradient(
        self, dq: Tensor, o: Tensor, lse: Tensor, do: Tensor, stats: Tensor, same_inst: bool
    ) -> None:
        """The local pass also writes `stats`, float32 [B, H, N, 2], which `key_gradients` reads."""
        launch = self.launches.dq_same_inst if same_inst else self.launches.dq_local
        programs, geometry = self._group(launch, same_inst, by_keys=False)
        kernel = _specialized()[1] if isinstance(launch, Specialized) else _query_gradient
        kernel(
            programs,
            (*self.inputs, o, lse, do, stats, dq, self.partials, self.counters, *self.plan),
            (
                *self.strides,
                *_strides(do, dq),
                *(self.scale * LOG2_E, self.scale, self.heads, self.queries),
                *geometry,
            ),
            **self._constants(launch, same_inst),
        )

    def key_gradients(self, gradients: Sequence[Tensor], do: Tensor, stats: Tensor, same_inst: bool) -> None:
        """`gradients` are those of k_s, v_s, k_r and v_r."""
        launch = self.launches.dkv_same_inst if same_inst else self.launches.dkv_local
        programs, geometry = self._group(launch, same_inst, by_keys=True)
        dk_s, _, dk_r, _ = gradients  # dv has the strides of dk
        kernel = _specialized()[2] if isinstance(launch, Specialized) else _key_gradient
        kernel(
            programs,
            (*self.inputs, do, stats, *gradients, self.partials, self.counters, *self.plan),
            (
                *self.strides,
                *_strides(do, dk_s, dk_r),
                *(self.scale * LOG2_E, self.scale, self.heads, self.queries),
                *geometry,
            ),
            **self._constants(launch, same_inst),
        )

    def _constants(self, launch: Launch | Specialized, same_inst: bool) -> dict:
        """In the order of the kernels' parameters, then options of the compiler."""
        constants = {"FIRST": not same_inst, "OVERLAPS": self.overlaps}
        if isinstance(launch, Specialized):
            constants |= {"D": self.dim, "STAGES": launch.num_stages, "LAG": launch.lag}
            constants |= {"PRODUCER_REGISTERS": launch.producer_registers}
            if launch.consumer_registers is not None:
                constants["CONSUMER_REGISTERS"] = launch.consumer_registers
            constants["num_warps"] = 4
        else:
            constants |= {"BM": launch.block_m, "BN": launch.block_n, "D": self.dim, "PRECISION": "ieee"}
            constants |= {"STAGES": launch.num_stages, "num_warps": launch.num_warps}
        if launch.maxnreg is not None:
            constants["maxnreg"] = launch.maxnreg
        return constants | overlap.options(self.overlaps)

    def _group(
        self, launch: Launch | Specialized, same_inst: bool, by_keys: bool
    ) -> tuple[tuple[int], tuple[int, ...]]:
        """The grid for a group of a plan, and the kernels' arguments from `summaries` to `items`."""
        batch, q_blocks, k_blocks = self.batch, self.q_blocks, self.k_blocks
        blocks = k_blocks if by_keys and not same_inst else q_blocks
        first_block = batch * (q_blocks * (by_keys or same_inst) + k_blocks * same_inst)
        parts = 1 if isinstance(launch, Specialized) else BLOCK // launch.block_m  # programs of an item
        programs = (batch * blocks + self.slots) * parts * self.heads
        group = 2 * by_keys + same_inst
        return (programs,), (self.summaries, blocks, first_block, group, self.items)

    def _pairs(self) -> tuple[tuple[int], tuple[int, ...]]:
        """As `_group`, for pairs of blocks of the same-instrument pass."""
        batch, blocks = self.batch, self.q_blocks
        programs = (batch * -(-blocks // 2) + self.slots) * self.heads
        first_block = batch * (blocks + self.k_blocks)
        return (programs,), (self.summaries, blocks, first_block, PAIRS.value, self.items)


@cache
def _specialized() -> tuple[Launcher, Launcher, Launcher]:
    """Kernels in Gluon: of the forward, of the gradients of queries, and of those of keys. Imported where
    they are used, since not all versions of Triton have Gluon, and none interprets it."""
    from .hopper_forward import hopper_forward_kernel
    from .hopper_key_gradients import hopper_key_gradient_kernel
    from .hopper_query_gradient import hopper_query_gradient_kernel

    kernels = hopper_forward_kernel, hopper_query_gradient_kernel, hopper_key_gradient_kernel
    return tuple(map(Launcher, kernels))


def _addressable(x: Tensor) -> Tensor:
    """`x`, or a copy with contiguous channels, tokens that begin at multiples of 16 bytes, and offsets within
    a head that fit 32 bits."""
    fits = x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31
    steps = [stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride()) if size > 1]
    aligned = not any(address % 16 for address in (x.data_ptr(), *steps))
    return x if fits and aligned else x.clone(memory_format=torch.contiguous_format)


def _empty_like(x: Tensor) -> Tensor:
    """[B, H, length, D] laid out as [B, length, H, D]."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def _with_output_strides(o: Tensor, q: Tensor) -> Tensor:
    """`o` in the strides of `_outputs`, which hooks on saved tensors may have changed."""
    like = _empty_like(q)
    return o if o.stride() == like.stride() else like.copy_(o)


def _check_inputs(q: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> None:
    """Raises ValueError if shapes or dtypes do not match, with which kernels would read out of bounds."""
    batch, heads, _, dim = q.shape
    for k, v in ((k_s, v_s), (k_r, v_r)):
        if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, dim):
            shapes = [list(x.shape) for x in (q, k, v)]
            raise ValueError(f"shapes of queries, keys and values do not match: {shapes}")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(
                f"queries, keys and values must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
            )


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _strides(*tensors: Tensor) -> "list[tuple[int, ...]]":
    """Strides of (batch, head, token) of each."""
    return [x.stride()[:3] for x in tensors]


_INPUTS = "Tensor q, Tensor k_s, Tensor v_s, Tensor k_r, Tensor v_r"
_BARS = "Tensor bars, Tensor slot"
_PLAN = "Tensor order, Tensor gathered, Tensor bits, Tensor items, Tensor needs"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _register(name: str, structure: str, forward: Callable, backward: Callable) -> None:
    """A phase and its gradient; `structure` are the tensors of the schema that come after the inputs."""
    register(
        f"{name}({_INPUTS}, {structure}) -> (Tensor, Tensor)", lambda q, *_: _outputs(q), forward, forward
    )
    register(
        f"{name}_backward({_INPUTS}, {structure}, Tensor o, Tensor lse, Tensor do) -> {_GRADIENTS}",
        lambda *x: tuple(map(_empty_like, x[:5])),
        backward,
        backward,
    )
    run_backward = getattr(torch.ops.meloformer, f"{name}_backward")

    def setup_context(ctx, inputs, output):
        o, lse = output
        ctx.save_for_backward(*inputs, o, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    def gradients(ctx, do, _):
        others = len(ctx.saved_tensors) - 7
        if do is None:
            return (None,) * (5 + others)
        return (*run_backward(*ctx.saved_tensors, do), *[None] * others)

    register_gradient(name, gradients, setup_context)


_register("summarize", _BARS, summarize, summarize_backward)
_register("update", _PLAN, update, update_backward)
