"""RMSNorm of residual streams as PyTorch operators: the residual addition, the norm, and their gradients.

A layer reads its stream twice, as it is and normed. In the backward the gradients of both readers are added,
for which the code of torch.compile takes half again as long as memory bandwidth demands; here it is one pass.
Streams that go through one network are normed into one tensor, so that the matrix products are joint as well.

Shape suffixes in comments: E channels, T rows of all streams together (tokens of all batch rows).
"""

import torch
from torch import Tensor

from .operators import refuse_second_gradients, register


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich, 2019, arXiv:1910.07467), in the dtype of x.

    Computed in the dtype of the gain, on CUDA in float32, and rounded once.

    Args:
        x: [..., E]
        gain: [E]

    Raises:
        ValueError: shapes or dtypes do not match, eps is not positive, or float64 on CUDA.
        RuntimeError: in the backward, with create_graph.
    """
    _check(gain, eps, x, None)
    return _Norm.apply(x, None, None, None, gain, eps, False)[0].view(x.shape)


def rms_norm_of_stream(
    x: Tensor, gain: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + added (or x), [..., E], and its `rms_norm` flattened to [T, E]. Errors are those of `rms_norm`.

    Use the returned stream in what follows, not x: then the backward adds the gradients of both results in
    the kernel.

    Args:
        x, added: [..., E], of one shape and dtype.
        gain: [E].
    """
    _check(gain, eps, x, added)
    return _Norm.apply(x, added, None, None, gain, eps, True)


def rms_norm_of_streams(
    x: Tensor, added_to_x: Tensor, y: Tensor, added_to_y: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + added_to_x, y + added_to_y, and the `rms_norm` of both in one tensor [T, E], the rows of x first.

    See `rms_norm_of_stream`.
    """
    _check(gain, eps, x, added_to_x, y, added_to_y)
    return _Norm.apply(x, added_to_x, y, added_to_y, gain, eps, True)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _check(gain: Tensor, eps: float, *streams: Tensor | None) -> None:
    x = streams[0]
    if gain.shape != x.shape[-1:]:
        raise ValueError(f"expected a gain of {x.shape[-1]} channels, got {list(gain.shape)}")
    for stream, added in zip(streams[::2], streams[1::2]):
        for other in (stream, added):
            if other is not None and (other.dtype, other.shape[-1]) != (x.dtype, x.shape[-1]):
                raise ValueError(
                    f"streams must share dtype and channels, got {other.dtype} {list(other.shape)}"
                )
        if added is not None and added.shape != stream.shape:
            raise ValueError(f"cannot add {list(added.shape)} to a stream {list(stream.shape)}")
    if eps < torch.finfo(torch.float32).tiny:
        raise ValueError(f"eps must be positive in float32, got {eps}")
    if gain.is_cuda and torch.float64 in (gain.dtype, x.dtype):
        raise ValueError("rms_norm computes in float32 on CUDA: float64 would not be what it says")


class _Norm(torch.autograd.Function):
    """Of one stream or two, with additions to both or to none. With `carries` it returns the streams as
    well."""

    @staticmethod
    def forward(ctx, x, added_to_x, y, added_to_y, gain, eps: float, carries: bool):
        streams = [x] if y is None else [x, y]
        added = [part for part in (added_to_x, added_to_y) if part is not None]
        *sums, normed = torch.ops.meloformer.rms_norm(streams, added, gain, eps)
        ctx.eps, ctx.two, ctx.adds = eps, y is not None, added_to_x is not None
        ctx.save_for_backward(gain, *(sums if ctx.adds else streams))
        if not carries:
            return (normed,)
        return *(sums if ctx.adds else [stream.view_as(stream) for stream in streams]), normed

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        refuse_second_gradients("rms_norm")
        *d_streams, d_normed = gradients
        gain, *streams = ctx.saved_tensors
        *d_streams, d_gain = torch.ops.meloformer.rms_norm_backward(
            d_normed, d_streams, streams, gain, ctx.eps
        )
        dx, dy = d_streams if ctx.two else (*d_streams, None)
        return dx, dx if ctx.adds else None, dy, dy if ctx.adds else None, d_gain, None, None


def _cpu(streams: list[Tensor], added: list[Tensor], gain: Tensor, eps: float) -> list[Tensor]:
    """The sums, if anything is added, and the norm [T, E] of all streams."""
    sums = [x.contiguous() + more.contiguous() for x, more in zip(streams, added)]
    x = _joined(sums or streams)
    wide = x.to(gain.dtype)
    return [*sums, (wide * _rstd(wide, eps) * gain).to(x.dtype)]


def _cpu_backward(
    d_normed: Tensor, d_streams: list[Tensor], streams: list[Tensor], gain: Tensor, eps: float
) -> list[Tensor]:
    """The gradients of the streams, `d_streams` added to them unless it is empty, and of the gain."""
    x = _joined(streams)
    wide, d_normed = x.to(gain.dtype), d_normed.to(gain.dtype)
    rstd = _rstd(wide, eps)
    d_wide = d_normed * gain * rstd
    d_wide = d_wide - wide * rstd.square() * (d_wide * wide).mean(-1, keepdim=True)
    if d_streams:
        d_wide = d_wide + _joined(d_streams).to(gain.dtype)
    parts = d_wide.to(x.dtype).split([_rows(part) for part in streams])
    # Copies, since an operator must not return views of one tensor.
    dx = [part.clone().view(like.shape) for part, like in zip(parts, streams)]
    return [*dx, (d_normed * wide * rstd).sum(0)]


def _joined(streams: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in streams])


def _rstd(wide: Tensor, eps: float) -> Tensor:
    return (wide.square().mean(-1, keepdim=True) + eps).rsqrt()


def _cuda(streams: list[Tensor], added: list[Tensor], gain: Tensor, eps: float) -> list[Tensor]:
    from .norm_kernels import forward  # imports triton

    return forward(streams, added, gain, eps)


def _cuda_backward(
    d_normed: Tensor, d_streams: list[Tensor], streams: list[Tensor], gain: Tensor, eps: float
) -> list[Tensor]:
    from .norm_kernels import backward

    return backward(d_normed, d_streams, streams, gain, eps)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake(streams: list[Tensor], added: list[Tensor], gain: Tensor, eps: float) -> list[Tensor]:
    rows = sum(_rows(x) for x in streams)
    return [*(_like(x) for x in streams if added), streams[0].new_empty(rows, streams[0].shape[-1])]


def _fake_backward(
    d_normed: Tensor, d_streams: list[Tensor], streams: list[Tensor], gain: Tensor, eps: float
) -> list[Tensor]:
    return [*map(_like, streams), _like(gain)]


register(
    "rms_norm(Tensor[] streams, Tensor[] added, Tensor gain, float eps) -> Tensor[]",
    *(_fake, _cpu, _cuda),
)
register(
    "rms_norm_backward(Tensor d_normed, Tensor[] d_streams, Tensor[] streams, Tensor gain, float eps) "
    "-> Tensor[]",
    *(_fake_backward, _cpu_backward, _cuda_backward),
)
