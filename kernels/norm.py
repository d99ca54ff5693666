"""RMSNorm of residual streams as PyTorch operators: what is added to a stream, its norm, and the gradients.

A layer reads its stream twice, as it is and normed. In the backward both gradients meet there, and what
torch.compile writes for that takes half again as long as the memory would; here it is one pass. Streams that
go through one network are normed into one tensor: then its matrix products are one, too.
"""

import torch
from torch import Tensor

from .gradients import refuse_second_gradients

_library = torch.library.Library("meloformer", "FRAGMENT")
_library.define("rms_norm(Tensor[] streams, Tensor[] added, Tensor gain, float eps) -> Tensor[]")
_library.define(
    "rms_norm_backward(Tensor of_normed, Tensor[] of_streams, Tensor[] streams, Tensor gain, float eps) "
    "-> Tensor[]"
)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich, 2019, arXiv:1910.07467), in the dtype of x.

    Computed in the dtype of the gain, on CUDA in float32, and rounded once.

    Args:
        x: [..., E]
        gain: [E]

    Raises:
        ValueError: shapes or dtypes do not belong together, eps is not positive, or float64 on CUDA.
    """
    _check(gain, eps, x, None)
    return _Norm.apply(x, None, None, None, gain, eps, False)[0].view(x.shape)


def rms_norm_of_stream(
    x: Tensor, gain: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The stream x, [..., E], with what is `added` to it, if anything is; and its `rms_norm`, [T, E].

    What goes on with the stream must take it from here: then the backward adds up its gradients at once.
    """
    _check(gain, eps, x, added)
    return _Norm.apply(x, added, None, None, gain, eps, True)


def rms_norm_of_streams(
    x: Tensor, added_to_x: Tensor, y: Tensor, added_to_y: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_of_stream` of two, row after row in one norm: the rows of x come first."""
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
    """Of one stream or two, `added` to both or to none. With `carries` it returns them, too."""

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
        *of_streams, of_normed = gradients
        gain, *streams = ctx.saved_tensors
        *of_streams, of_gain = torch.ops.meloformer.rms_norm_backward(
            of_normed, of_streams, streams, gain, ctx.eps
        )
        of_x, of_y = of_streams if ctx.two else (*of_streams, None)
        return of_x, of_x if ctx.adds else None, of_y, of_y if ctx.adds else None, of_gain, None, None


def _cpu(streams: list[Tensor], added: list[Tensor], gain: Tensor, eps: float) -> list[Tensor]:
    """The sums, if anything is added, and the norm of all."""
    sums = [x.contiguous() + more.contiguous() for x, more in zip(streams, added)]
    x = _joined(sums or streams)
    wide = x.to(gain.dtype)
    return [*sums, (wide * _share(wide, eps) * gain).to(x.dtype)]


def _cpu_backward(
    of_normed: Tensor, of_streams: list[Tensor], streams: list[Tensor], gain: Tensor, eps: float
) -> list[Tensor]:
    """The gradients of the streams, with those that they had, if any; and of the gain."""
    x = _joined(streams)
    wide, of_normed = x.to(gain.dtype), of_normed.to(gain.dtype)
    share = _share(wide, eps)
    of_wide = of_normed * gain * share
    of_wide = of_wide - wide * share.square() * (of_wide * wide).mean(-1, keepdim=True)
    if of_streams:
        of_wide = of_wide + _joined(of_streams).to(gain.dtype)
    parts = of_wide.to(x.dtype).split([_rows(part) for part in streams])
    # Copies, since an operator must not return views of one tensor.
    of_x = [part.clone().view(like.shape) for part, like in zip(parts, streams)]
    return [*of_x, (of_normed * wide * share).sum(0)]


def _joined(streams: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in streams])


def _share(wide: Tensor, eps: float) -> Tensor:
    return (wide.square().mean(-1, keepdim=True) + eps).rsqrt()


def _cuda(streams: list[Tensor], added: list[Tensor], gain: Tensor, eps: float) -> list[Tensor]:
    from .norm_kernels import forward  # imports triton

    return forward(streams, added, gain, eps)


def _cuda_backward(
    of_normed: Tensor, of_streams: list[Tensor], streams: list[Tensor], gain: Tensor, eps: float
) -> list[Tensor]:
    from .norm_kernels import backward

    return backward(of_normed, of_streams, streams, gain, eps)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake(streams: list[Tensor], added: list[Tensor], gain: Tensor, eps: float) -> list[Tensor]:
    rows = sum(_rows(x) for x in streams)
    return [*(_like(x) for x in streams if added), streams[0].new_empty(rows, streams[0].shape[-1])]


def _fake_backward(
    of_normed: Tensor, of_streams: list[Tensor], streams: list[Tensor], gain: Tensor, eps: float
) -> list[Tensor]:
    return [*map(_like, streams), _like(gain)]


for _name, _on_cpu, _on_cuda, _on_fakes in (
    ("rms_norm", _cpu, _cuda, _fake),
    ("rms_norm_backward", _cpu_backward, _cuda_backward, _fake_backward),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"meloformer::{_name}", _on_fakes, lib=_library)
